"""The evaluations of a run: when they come, and whether training waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType

import structlog

from mulligan.common.tasks import cancel
from mulligan.common.tracing import root_span
from mulligan.trainer.activity import CurrentActivity
from mulligan.trainer.evaluation import evaluate, measure
from mulligan.trainer.events import EventLog
from mulligan.trainer.player import Player
from mulligan.trainer.recall import Recall
from mulligan.trainer.sampling import PublishedPolicy, ServedPolicy
from mulligan.trainer.settings import RunSettings
from mulligan.trainer.trainable import prompt_notices

log = structlog.get_logger()


class Evaluations:
    """Measures the policy of a run in each of its environments. What was measured before is not measured again.

    With an `evaluator`, a second policy that is given the weights of `actor`, an evaluation runs beside training;
    `begin` waits only for the evaluation before. Otherwise it waits until the policy was measured. `tell` takes
    notices, `activity` is told what is measured, and `recall` gives what first attempts read of the memory now. Leaving
    the block ends what is under way.
    """

    def __init__(
        self,
        run_id: str,
        settings: RunSettings,
        players: Mapping[str, Player],
        actor: PublishedPolicy | ServedPolicy,
        evaluator: PublishedPolicy | None,
        events: EventLog,
        activity: CurrentActivity,
        tell: Callable[[list[str]], None],
        recall: Callable[[], Awaitable[Recall | None]],
    ):
        self._run_id = run_id
        self._settings = settings
        self._players = players
        self._actor = actor
        self._evaluator = evaluator
        self._events = events
        self._activity = activity
        self._tell = tell
        self._recall = recall
        self._beside: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Evaluations:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await cancel(self._beside)

    def is_due(self, trained: int) -> bool:
        """Whether the policy is to be measured before the next step."""
        every = self._settings.evaluation.every
        return trained == 0 or (every > 0 and trained % every == 0)

    @property
    def is_running(self) -> bool:
        """Beside training. Raises what the evaluation raised."""
        if self._beside is None:
            return False
        if self._beside.done():
            self._beside.result()
        return not self._beside.done()

    async def begin(self, trained: int) -> None:
        """Measures the policy as it is after so many steps."""
        await self.finish()
        missing = [
            (place, environment)
            for place, environment in enumerate(self._players)
            if trained not in self._events.evaluations(self._told_as(place, environment))
        ]
        if not missing:
            return
        if self._evaluator is None:
            if self._settings.rollout.max_staleness and 0 < trained < self._settings.steps:
                self._tell(
                    [
                        "the learner waits for each evaluation: with policies.evaluator, a second policy that serves "
                        "the same model, evaluations run beside training"
                    ]
                )
            await self._measure(trained, missing)
            return
        assert isinstance(self._actor, PublishedPolicy), "a run without a learner has no evaluator"
        await self._evaluator.publish_as(self._actor)
        self._beside = asyncio.create_task(self._measure(trained, missing), name=f"evaluation after step {trained}")

    async def finish(self) -> None:
        """Waits for an evaluation that runs beside training. Raises what it raised."""
        if self._beside is not None:
            await asyncio.wait([self._beside])
            self._beside.result()

    async def _measure(self, trained: int, missing: Sequence[tuple[int, str]]) -> None:
        whole = root_span("run.evaluation", run_id=self._run_id, step=trained)
        try:
            with whole:
                await self._measure_places(trained, missing)
        finally:
            self._activity.begin("")
            whole.end()

    async def _measure_places(self, trained: int, missing: Sequence[tuple[int, str]]) -> None:
        recall = await self._recall()
        for place, environment in missing:
            player = self._players[environment]
            log.info("evaluating", run_id=self._run_id, step=trained, environment=environment, tasks=len(player.tasks))
            name = f"{self._run_id}-evaluation-{trained}" + (f"-e{place}" if place else "")
            named = replace(player, name=name, recall=recall)
            self._activity.begin("evaluating attempts", partial(_counted, named))
            attempts = await evaluate(named)
            self._tell(prompt_notices(attempts))
            self._events.add(await measure(named, trained, attempts, self._told_as(place, environment)))

    @staticmethod
    def _told_as(place: int, environment: str) -> str:
        """Empty for the run's own."""
        return environment if place else ""


def _counted(player: Player) -> tuple[int, int]:
    """The attempts of an evaluation that have ended, and all of them."""
    return player.progress.ended, player.progress.total
