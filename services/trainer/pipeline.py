"""Sampling of several steps at once, while an earlier one is learned; how old the trained samples are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from types import TracebackType

from mulligan.common.experience import Experience, Sample
from mulligan.common.tasks import PrioritySlots, cancel
from mulligan.common.tracing import Span, root_span
from mulligan.trainer.folder import RunFolder
from mulligan.trainer.journal import SamplingBegan, StepJournal, StepStarted, set_aside
from mulligan.trainer.rounds import Chooser, SampledStep, sample_rounds
from mulligan.trainer.run_environment import EnvironmentChanged, RunEnvironments, RunTasks
from mulligan.trainer.sampling import PublishedPolicy, ServedPolicy
from mulligan.trainer.step import StepRunner


class TooStale(RuntimeError):
    """A step was to be trained on tokens that are older than `rollout.max_staleness` allows: a fault of the trainer."""


@dataclass
class StepSampling:
    """The sampling of one step. `runner` records into `journal`. `waited` is how long all sampling stood still before
    this step could begin. Times are the event loop's, in seconds. `span` is that of the step, until it is trained."""

    step: int
    journal: StepJournal
    runner: StepRunner
    began: float
    waited: float
    span: Span
    ended: float = 0.0
    task: asyncio.Task[SampledStep] | None = None

    @property
    def is_sampled(self) -> bool:
        return self.task is not None and self.task.done() and not self.task.cancelled() and not self.task.exception()


class Pipeline:
    """Samples the steps of a run ahead of the learner, within the bound S = `rollout.max_staleness`.

    `admit` begins the sampling of every step up to `trained` + S: up to S + 1 steps are sampled or learned at once.
    Each has its own journal. `take` waits for one of them, `close` ends it after training. With S = 0 a step is
    sampled after the one before was trained.

    Steps are trained in order, on all that was sampled for them, so no group is discarded for being slow. A token of
    step j has a version that learned at least j - S steps: its age, in steps, is at most S. Among the chains that wait
    for a slot, those of older steps come first.

    Leaving the block cancels what still samples. Its journals stay; after EnvironmentChanged, those of steps that were
    not checked are set aside. `notice` is told what a damaged journal costs.
    """

    def __init__(
        self,
        runner: StepRunner,
        policy: PublishedPolicy | ServedPolicy,
        environments: RunEnvironments,
        tasks: Mapping[str, RunTasks],
        chooser: Chooser,
        folder: RunFolder,
        notice: Callable[[str], None],
    ):
        rollout = runner.settings.rollout
        self.slots = PrioritySlots(rollout.concurrency)
        self._ahead = rollout.max_staleness
        self._runner = replace(runner, slots=self.slots)
        self._policy = policy
        self._environments = environments
        self._tasks = tasks
        self._chooser = chooser
        self._journals = folder.journal
        self._notice = notice
        self._open: dict[int, StepSampling] = {}
        self._idle_since: float | None = None

    async def __aenter__(self) -> Pipeline:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await cancel(*(sampling.task for sampling in self._open.values()))
        for sampling in self._open.values():
            sampling.journal.close()
            sampling.span.end()
            if isinstance(error, EnvironmentChanged) and not sampling.is_sampled:
                set_aside(self._journals, sampling.step)

    async def admit(self, trained: int) -> None:
        """Begins the sampling of all steps that may be sampled when `trained` steps are trained.

        The tasks and the memory of a step are fixed here, in the order of the steps. So they depend on no timing.
        """
        self._chooser.settle(trained)
        for step in range(trained, min(trained + self._ahead + 1, self._runner.settings.steps)):
            if step not in self._open:
                await self._begin(step, trained)

    async def _begin(self, step: int, trained: int) -> None:
        now = _clock()
        journal = self._journal(step)
        waited = 0.0 if self._idle_since is None else now - self._idle_since
        self._idle_since = None
        runner = replace(self._runner, recorder=journal)
        span = root_span("run.step", run_id=runner.run_id, step=step)
        sampling = self._open[step] = StepSampling(step, journal, runner, now, waited, span)
        with span:
            await self._start(sampling, trained)

    async def _start(self, sampling: StepSampling, trained: int) -> None:
        step, journal, runner = sampling.step, sampling.journal, sampling.runner
        if journal.started is None:
            task_ids, environments = self._chooser.named(choice := self._chooser.choose(step))
            memory_version = await runner.memory.snapshot(runner.memory_scope)
            version = self._policy.version
            journal.start(StepStarted(step, task_ids, memory_version, version, environments, choice.horizon))
        assert journal.started is not None
        if self._ahead:
            journal.begin(SamplingBegan(step, self._policy.version, trained))
        self._chooser.begin(journal.started)
        sampling.task = asyncio.create_task(self._sample(sampling), name=f"sampling of step {step}")

    def _journal(self, step: int) -> StepJournal:
        journal = StepJournal(self._journals, step)
        told = "; ".join(map(str, journal.damage))
        if flaw := journal.flaw(overlapping=self._ahead > 0):
            journal.close()
            set_aside(self._journals, step)
            self._notice(f"{told}: step {step} is sampled again, because {flaw}; its file is set aside")
            return StepJournal(self._journals, step)
        if told:
            self._notice(f"{told}: what step {step} lost there is sampled again")
        return journal

    async def _sample(self, sampling: StepSampling) -> SampledStep:
        """Raises EnvironmentChanged when an environment changed meanwhile; then the attempts are not used."""
        known = sampling.journal.experiences
        sampled = await sample_rounds(sampling.runner, sampling.journal, self._chooser)
        if sampling.journal.experiences > known:
            await self._environments.check(self._tasks)
        sampling.ended = _clock()
        others = [one for one in self._open.values() if one is not sampling]
        if all(one.is_sampled for one in others):
            self._idle_since = sampling.ended
        return sampled

    def sampling(self, step: int) -> StepSampling:
        """Of a step that was admitted."""
        return self._open[step]

    async def take(self, step: int) -> SampledStep:
        """Waits for what the step sampled. Raises what the sampling of this or of a later step raises."""
        while True:
            tasks = [sampling.task for sampling in self._open.values() if sampling.task is not None]
            for task in tasks:
                if task.done():
                    task.result()
            wanted = self._open[step].task
            assert wanted is not None, "the step was admitted"
            if wanted.done():
                return wanted.result()
            await asyncio.wait([task for task in tasks if not task.done()], return_when=asyncio.FIRST_COMPLETED)

    def close(self, step: int) -> None:
        """The step was trained."""
        sampling = self._open.pop(step)
        sampling.journal.close()
        sampling.span.end()

    def staleness(self, step: int, experiences: Sequence[Experience]) -> dict[str, float]:
        """The metrics `staleness_mean` and `staleness_max` over the samples of the trained policy: how many steps the
        weights that learn the step are ahead of those that sampled the oldest token. Empty without `max_staleness`.

        Raises TooStale.
        """
        begun = self._open[step].journal.begun
        found = ages(step, (sample for experience in experiences for sample in experience.samples), begun)
        if not self._ahead or not found:
            return {}
        if max(found) > self._ahead:
            raise TooStale(
                f"step {step} has a sample that is {max(found)} steps old, and rollout.max_staleness is {self._ahead}"
            )
        return {"staleness_mean": fmean(found), "staleness_max": float(max(found))}


def ages(step: int, samples: Iterable[Sample], begun: Sequence[SamplingBegan]) -> list[int]:
    """How old the oldest token of each sample of the trained policy is when the step is learned, in trained steps.

    `begun` says how many steps a version had learned, for each process that sampled. Version numbers alone do not: a
    resumed run publishes its checkpoint under a new one.
    """
    found = []
    for sample in samples:
        versions = [
            span.policy_version
            for sequence in sample.sequences
            for segment in sequence.segments
            for span in segment.policy_versions
        ]
        if sample.policy or not versions or not begun:
            continue
        oldest = min(versions)
        process = max(
            (one for one in begun if one.policy_version <= oldest), key=lambda one: one.policy_version, default=begun[0]
        )
        found.append(step - (process.trained + oldest - process.policy_version))
    return found


def _clock() -> float:
    return asyncio.get_running_loop().time()
