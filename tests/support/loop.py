"""One step of any algorithm over fakes, for numbers that were computed by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.common.experience import Experience
from mulligan.common.inference import PolicyInfo
from mulligan.trainer.data import Datum, PolicyGradient
from mulligan.trainer.harness import Harness
from mulligan.trainer.journal import StepJournal, StepStarted
from mulligan.trainer.member import NoRecorder, Recorder
from mulligan.trainer.sampling import NamedPolicy
from mulligan.trainer.settings import RunSettings
from mulligan.trainer.step import StepRunner
from mulligan.trainer.wire import settings_from_proto, settings_to_proto, validated
from tests.support.fakes import FakeEnvironment, FakeLearner, FakeMemory, FakePolicy


class Loop:
    """`say(system, last message)` scripts the policy. Attempts of a group run one after the other."""

    def __init__(
        self,
        say: Callable[[str, str], str],
        *,
        environment: FakeEnvironment | None = None,
        rewrites: bool = False,
        **settings: Any,
    ):
        self.environment = environment or FakeEnvironment({"t0": "go"})
        self.policy = FakePolicy(lambda system, last, _: say(system, last), rewrites_history=rewrites)
        self.memory = FakeMemory()
        self.learner = FakeLearner()
        rollout = {"rollouts_per_task": 4, "concurrency": 1, "max_restarts": 2} | settings.pop("rollout", {})
        loss = {"kl_coefficient": 0} | settings.pop("loss", {})
        self.settings = RunSettings.model_validate(
            {"environment": "fake", "rollout": rollout, "loss": loss, **settings}
        )

    async def step(
        self, step: int = 0, tasks: Sequence[str] = ("t0",), recorder: Recorder | None = None
    ) -> list[Experience]:
        info = await self.environment.describe("fake")
        policy_info: PolicyInfo = await self.policy.info()
        restarts = self.settings.rollout.max_restarts
        harness = Harness(self.environment, self.policy, info, policy_info, "x", restarts, await self._speakers())
        self.runner = StepRunner("run", self.settings, harness, self.memory, self.learner, recorder or NoRecorder())
        experiences = await self.runner.sample(step, tasks, await self.memory.snapshot("run"))
        self.metrics = self.runner.metrics(experiences) | await self.runner.learn(step, experiences)
        await self.runner.memorise(experiences)
        return experiences

    async def _speakers(self) -> dict[str, NamedPolicy]:
        """A reflector and a judge that are named in the settings are among `policy.others`."""
        named = {purpose: getattr(self.settings.policies, purpose) for purpose in ("reflector", "judge")}
        return {purpose: await NamedPolicy.open(self.policy, name) for purpose, name in named.items() if name}

    def branch(self, name: str) -> list[Datum]:
        """What the learner was given of a branch, after checks that any learner makes."""
        return self.learner.branch(name)

    def advantages(self, branch: str) -> list[float]:
        data = self.learner.branch(branch)
        return [datum.objective.advantage for datum in data if isinstance(datum.objective, PolicyGradient)]

    def survive_the_wire(self) -> bool:
        """Whether the settings are the same after they crossed the wire."""
        return settings_from_proto(settings_to_proto(self.settings)) == self.settings


def in_turn(
    first: Iterable[str], later: Iterable[str], texts: Iterable[str] | None = None
) -> Callable[[str, str], str]:
    """For `Loop`: first attempts, texts such as reflections, and all later attempts, each with its answers in order.
    Texts are "rule 0", "rule 1", … unless they are given."""
    answers = {"solve": iter(first), "reflect": map("rule {}".format, count()) if texts is None else iter(texts)}
    others = iter(later)
    return lambda system, last: next(answers.get(system, others))


def near(number: float) -> Any:
    """A number to compare with, rounding aside, as a part of a larger object."""
    return pytest.approx(number, abs=1e-5)


def trained_text(datum: Datum) -> str:
    """The trained tokens of a datum as text; tokens of the fakes are characters."""
    return "".join(chr(token) for token, loss in zip(datum.token_ids, datum.loss_mask, strict=True) if loss)


def whole_text(datum: Datum) -> str:
    return "".join(map(chr, datum.token_ids))


async def lives(make: Callable[[], Loop], folder: Path) -> list[list[Experience]]:
    """The experiences of a step, and those of its repetition by a second process, which samples nothing anew."""
    found = []
    for life in range(2):
        journal = StepJournal(folder, 0)
        journal.start(StepStarted(0, ["t0"], 0, 0))
        loop = make()
        found.append(await loop.step(recorder=journal))
        journal.close()
        assert bool(loop.policy.calls) is (life == 0)
    return found


def refused(table: dict[str, Any]) -> tuple[str, str]:
    """The setting for which a run with this algorithm is refused, and what is said of it."""
    with pytest.raises(DomainError) as caught:
        validated(RunSettings, {"environment": "fake", "algorithm": table})
    assert caught.value.reason is Reason.INVALID_SETTING
    return caught.value.metadata["field"], caught.value.message
