"""The evaluations of a run: when they come, and whether training waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType

import structlog

from mulligan.common.errors import DomainError, Reason, fault, incident
from mulligan.common.tasks import cancel
from mulligan.common.tracing import root_span
from mulligan.trainer.activity import CurrentActivity
from mulligan.trainer.evaluation import evaluate, measure
from mulligan.trainer.events import EventLog
from mulligan.trainer.folder import UnfinishedEvaluation
from mulligan.trainer.player import Player
from mulligan.trainer.recall import Recall
from mulligan.trainer.sampling import PublishedPolicy, ServedPolicy
from mulligan.trainer.settings import RunSettings
from mulligan.trainer.trainable import prompt_notices

log = structlog.get_logger()
# Weights that were published, and cannot be given to a policy again.
_UNREADABLE = (Reason.WEIGHTS_NOT_FOUND, Reason.CHECKSUM_MISMATCH, Reason.BAD_WEIGHTS_URI)
EVALUATIONS_TAKE_LONG = (
    "the learner waits for evaluations that run beside training: one takes longer than evaluation.every steps; with a "
    "larger evaluation.every, or fewer evaluation.tasks or evaluation.samples, it does not wait"
)


class Evaluations:
    """Measures the policy of a run in each of its environments. What was measured before is not measured again.

    With an `evaluator`, a second policy that is given the weights of `actor`, an evaluation runs beside training;
    `begin` waits only for the evaluation before. Otherwise it waits until the policy was measured. `tell` takes
    notices, `activity` is told what is measured, and `recall` gives what first attempts read of the memory now. Leaving
    the block ends what is under way.

    `unfinished` is what repeats the evaluation that runs beside training. Checkpoints have it, so they are saved
    meanwhile, and a resumed run gives it to `go_on`. Until the evaluation is over and its result is on the disk, the
    learner keeps the file of its weights (`PublishedPolicy.keeps`): also a policy service that lost them needs it.
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
        unfinished: UnfinishedEvaluation | None = None,
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
        self.unfinished: UnfinishedEvaluation | None = None
        self._set(unfinished)

    def _set(self, unfinished: UnfinishedEvaluation | None) -> None:
        self.unfinished = unfinished
        if isinstance(self._actor, PublishedPolicy):
            self._actor.keeps = (unfinished.weights.policy_version,) if unfinished is not None else ()

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

    def check(self) -> None:
        """Raises what the evaluation beside training raised."""
        if self._beside is not None and self._beside.done():
            self._beside.result()

    async def go_on(self) -> None:
        """Begins again what was unfinished when the run's checkpoint was saved, with the weights that it measured then.

        Where these are not there any more, a notice says so, and the evaluation is lost. Raises OSError where the disk
        does not give them now: the run can be resumed.
        """
        unfinished = self.unfinished
        if unfinished is None:
            return
        missing = self._missing(unfinished.step)
        lost = "" if self._evaluator is not None else "the run has no policies.evaluator any more"
        if missing and self._evaluator is not None:
            recall = await self._recall()
            if recall is not None and unfinished.memory_version is not None:
                recall = replace(recall, version=unfinished.memory_version)
            try:
                await self._evaluator.publish_as(unfinished.weights)
                self._begin_beside(missing, unfinished, recall)
                return
            except FileNotFoundError as error:  # of an upload
                gone = {"run_id": self._run_id, "step": unfinished.step, "incident": incident(error)}
                log.error("the weights of an evaluation are gone", **gone, exc_info=error)
                lost = f"its weights cannot be published again: {fault(error)}"
            except DomainError as error:
                if error.reason not in _UNREADABLE:
                    raise
                lost = f"its weights cannot be published again: {error.message}"
        if missing:
            self._tell([f"the evaluation after step {unfinished.step} is lost: it was cut off, and {lost}"])
        self._over()

    async def begin(self, trained: int) -> None:
        """Measures the policy as it is after so many steps."""
        await self.finish()
        missing = self._missing(trained)
        if not missing:
            return
        recall = await self._recall()
        if self._evaluator is None:
            overlapping = self._settings.trains and self._settings.rollout.max_staleness > 0
            if overlapping and 0 < trained < self._settings.steps:
                self._tell(
                    [
                        "the learner waits for each evaluation: with policies.evaluator, a second policy that serves "
                        "the same model, evaluations run beside training"
                    ]
                )
            await self._measure(trained, missing, recall)
            return
        assert isinstance(self._actor, PublishedPolicy), "a run without a learner has no evaluator"
        weights = self._actor.weights
        await self._evaluator.publish_as(weights)
        unfinished = UnfinishedEvaluation(trained, weights, None if recall is None else recall.version)
        self._begin_beside(missing, unfinished, recall)

    def _begin_beside(
        self, missing: Sequence[tuple[int, str]], unfinished: UnfinishedEvaluation, recall: Recall | None
    ) -> None:
        async def measured() -> None:
            await self._measure(unfinished.step, missing, recall)
            self._over()

        self._set(unfinished)
        self._beside = asyncio.create_task(measured(), name=f"evaluation after step {unfinished.step}")

    def _over(self) -> None:
        """No resumed run repeats it: its result is on the disk."""
        self._events.sync()
        self._set(None)

    def _missing(self, trained: int) -> list[tuple[int, str]]:
        """The environments in which the policy was not measured after so many steps, with their places."""
        return [
            (place, environment)
            for place, environment in enumerate(self._players)
            if trained not in self._events.evaluations(self._told_as(place, environment))
        ]

    @property
    def under_way(self) -> bool:
        """Whether an evaluation runs beside training."""
        return self._beside is not None and not self._beside.done()

    async def finish(self) -> None:
        """Waits for an evaluation that runs beside training. Raises what it raised."""
        if self._beside is not None:
            await asyncio.wait([self._beside])
            self._beside.result()

    async def _measure(self, trained: int, missing: Sequence[tuple[int, str]], recall: Recall | None) -> None:
        whole = root_span("run.evaluation", run_id=self._run_id, step=trained)
        try:
            with whole:
                await self._measure_places(trained, missing, recall)
        finally:
            self._activity.begin("")
            whole.end()

    async def _measure_places(self, trained: int, missing: Sequence[tuple[int, str]], recall: Recall | None) -> None:
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
