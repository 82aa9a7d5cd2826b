"""One training run, from its folder: the loop around the algorithm, and what makes it survive a restart."""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from statistics import fmean

import structlog

from services.common.errors import DomainError, Reason
from services.common.inference import PolicyInfo
from services.common.rewards import reaches
from services.common.types import Attempt, EnvironmentInfo, Split, TaskInfo
from services.trainer.algorithm import Erl, NoRecorder, evaluate
from services.trainer.episode import Player
from services.trainer.events import EvaluationEvent, EventLog, NoticeEvent, StepEvent
from services.trainer.folder import Checkpoint, RunFolder
from services.trainer.interfaces import EnvironmentPort, LearnerPort, MemoryPort, PolicyPort, Upload
from services.trainer.journal import StepCompleted, StepJournal, StepStarted
from services.trainer.metrics import rewards_of
from services.trainer.named import NamedPolicy, check_actor, check_environment, check_reflector
from services.trainer.published import PublishedPolicy
from services.trainer.seeds import tasks_of_step
from services.trainer.settings import RunSettings
from services.trainer.trainable import drop_notices, prompt_notices

log = structlog.get_logger()
LEARNER_LOSSES = 3  # how often in a row, without a step in between, a lost learner is set up again


class EvaluationFailed(RuntimeError):
    """None of an evaluation's attempts could be finished."""


@dataclass(frozen=True)
class Services:
    """The four ports of a run. `open_learner` gives (run id, settings) → a learner that the run owns. `upload` is for a
    policy service that does not see the trainer's files."""

    environment: EnvironmentPort
    policy: PolicyPort
    memory: MemoryPort
    open_learner: Callable[[str, RunSettings], Awaitable[LearnerPort]]
    upload: Upload | None = None

    async def actor(
        self, settings: RunSettings, learner: LearnerPort, notice: Callable[[str], None]
    ) -> PublishedPolicy:
        """The policy that a run trains. Raises DomainError INVALID_SETTING, MODEL_MISMATCH or UNKNOWN_POLICY."""
        found = await NamedPolicy.open(self.policy, settings.policies.actor)
        check_actor(found.info, settings, learner.fingerprint)
        return PublishedPolicy(found, learner, notice, self.upload)

    async def reflector(self, settings: RunSettings, actor: PolicyInfo) -> NamedPolicy | None:
        """Raises DomainError INVALID_SETTING or UNKNOWN_POLICY."""
        if not settings.policies.reflector:
            return None
        found = await NamedPolicy.open(self.policy, settings.policies.reflector)
        check_reflector(found.info, actor)
        return found


class Run:
    """`train` runs to the end, or until `stop`. Raises what makes a run fail."""

    def __init__(self, run_id: str, folder: RunFolder, services: Services, events: EventLog | None = None):
        self.run_id = run_id
        self.folder = folder
        self.settings = folder.settings()
        self.services = services
        self.events = events or EventLog(folder.events_file)  # watchers follow it across a stop and a resume
        self._stopping = False
        checkpoint = folder.checkpoint()
        self.step = checkpoint.step if checkpoint else 0

    def stop(self) -> None:
        """Ends training after the step that runs."""
        self._stopping = True

    def notice(self, text: str) -> None:
        log.info("notice", run_id=self.run_id, text=text)
        self.events.add(NoticeEvent(text))

    def _notice_once(self, texts: list[str]) -> None:
        """The first of each kind in a run, which is what stands before the colon."""
        notices = [entry.event.text for entry in self.events.entries if isinstance(entry.event, NoticeEvent)]
        told = {text.partition(":")[0] for text in notices}
        for text in texts:
            if text.partition(":")[0] not in told:
                self.notice(text)

    @property
    def train_seconds(self) -> float:
        return sum(event.metrics.get("seconds", 0.0) for event in self.events.steps().values())

    @property
    def stopped(self) -> bool:
        return self._stopping and self.step < self.settings.steps

    async def train(self) -> None:
        """Goes on from the last checkpoint. A learner that was lost is created again from it."""
        lost = 0
        while True:
            begun_at = self.step
            try:
                await self._train()
                return
            except DomainError as error:
                if error.reason not in (Reason.UNKNOWN_LEARNER, Reason.SEQUENCE_MISMATCH):
                    raise
                lost = 1 if self.step > begun_at else lost + 1
                if lost > LEARNER_LOSSES:
                    raise
                self.notice(f"the learner was lost ({error}); going on from the last checkpoint")

    async def _train(self) -> None:
        settings, services = self.settings, self.services
        info = await services.environment.describe(settings.environment)
        tasks = await services.environment.list_tasks(settings.environment, Split.TRAIN, settings.rollout.train_tasks)
        tests = await services.environment.list_tasks(settings.environment, Split.TEST, settings.evaluation.tasks)
        learner = await services.open_learner(self.run_id, settings)
        try:
            await self._train_with(learner, info, tasks, tests)
        finally:
            await learner.close()

    async def _train_with(
        self, learner: LearnerPort, info: EnvironmentInfo, tasks: list[TaskInfo], tests: list[TaskInfo]
    ) -> None:
        settings, services = self.settings, self.services
        actor = await services.actor(settings, learner, self.notice)
        check_environment(info, actor.info)
        reflector = await services.reflector(settings, actor.info)
        checkpoint = self.folder.checkpoint()
        if checkpoint is not None:
            await learner.load_checkpoint(checkpoint.name)
        self.step = checkpoint.step if checkpoint else 0
        incarnation, restarts = uuid.uuid4().hex[:8], settings.rollout.max_restarts
        player = Player(services.environment, actor, info, actor.info, incarnation, restarts, reflector)
        algorithm = Erl(self.run_id, settings, player, services.memory, learner, NoRecorder())
        await actor.publish()
        if checkpoint is None:
            await self._save(algorithm, 0)
        test_ids = [task.task_id for task in tests]
        while self.step < settings.steps and not self._stopping:
            if self._evaluation_due():
                await self._evaluate(algorithm, test_ids)
            await self._step(algorithm, actor, [task.task_id for task in tasks])
            if self.step % settings.checkpoint_every == 0 or self.step == settings.steps or self._stopping:
                await self._save(algorithm, self.step)
        if self.step == settings.steps:
            await self._evaluate(algorithm, test_ids)
            self.folder.write_summary(self.summary())

    async def _step(self, algorithm: Erl, policy: PublishedPolicy, task_ids: list[str]) -> None:
        """Sample, learn, publish, memorise. Every part is found again in the journal when the step is repeated."""
        start = time.monotonic()
        journal = StepJournal(self.folder.journal, self.step)
        try:
            if journal.started is None:
                rollout = self.settings.rollout
                chosen = tasks_of_step(len(task_ids), rollout.tasks_per_step, self.step, self.settings.seed)
                memory_version = await self.services.memory.snapshot(algorithm.memory_scope)
                journal.start(
                    StepStarted(self.step, [task_ids[index] for index in chosen], memory_version, policy.version)
                )
            assert journal.started is not None
            recording = replace(algorithm, recorder=journal)
            experiences = await recording.sample(self.step, journal.started.task_ids, journal.started.memory_version)
            sampled = time.monotonic()
            journal.sync()
            first = [experience.first_attempt for experience in experiences]
            later = [part for experience in experiences for part in experience.parts()]
            self._notice_once(prompt_notices(first, later))
            metrics = recording.metrics(experiences) | await recording.learn(self.step, experiences)
            self._notice_once(drop_notices(metrics))
            learned = time.monotonic()
            await policy.publish()
            await recording.memorise(experiences)
            end = time.monotonic()
            metrics |= {
                "policy_version": float(policy.version),
                "seconds": end - start,
                "sample_seconds": sampled - start,
                "learn_seconds": learned - sampled,
            }
            if policy.canary_difference is not None:
                metrics["canary_difference"] = policy.canary_difference
            if journal.completed is None:
                journal.finish(StepCompleted(self.step, metrics))
            journal.sync()
        finally:
            journal.close()
        if self.step not in self.events.steps():
            self.events.add(StepEvent(self.step, metrics))
        self.step += 1

    async def _save(self, algorithm: Erl, step: int) -> None:
        name = f"{self.run_id}-{step:06}"
        await algorithm.learner.save_checkpoint(name)
        memory_version = await self.services.memory.snapshot(algorithm.memory_scope)
        self.folder.write_checkpoint(Checkpoint(name, step, memory_version))

    def _evaluation_due(self) -> bool:
        every = self.settings.evaluation.every
        return (self.step == 0 or (every > 0 and self.step % every == 0)) and self.step not in self.events.evaluations()

    async def _evaluate(self, algorithm: Erl, test_ids: list[str]) -> None:
        if self.step in self.events.evaluations():
            return
        name = f"{self.run_id}-evaluation-{self.step}"
        settings = self.settings
        attempts = await evaluate(
            algorithm.player, name, test_ids, settings.evaluation, settings.rollout, settings.seed
        )
        self._notice_once(prompt_notices(attempts))
        self.events.add(evaluation_of(self.step, attempts, self.settings.algorithm.success_threshold))

    def summary(self) -> dict[str, object]:
        """`rollouts`: episodes started plus reflections written, the budget in which algorithms are compared.
        `grad_clipped`: share of the optimizer steps whose gradient norm was above `max_grad_norm`."""
        evaluations, steps = self.events.evaluations(), self.events.steps()
        curve = [
            {
                "step": step,
                "rollouts": int(sum(steps[earlier].metrics["rollouts"] for earlier in range(step))),
                "success": evaluation.success,
            }
            for step, evaluation in sorted(evaluations.items())
        ]
        return {
            "run_id": self.run_id,
            "test_success_before": evaluations[0].success,
            "test_success_after": evaluations[self.step].success,
            "train_seconds": self.train_seconds,
            "steps": self.step,
            "rollouts": int(sum(event.metrics["rollouts"] for event in steps.values())),
            "sampled_tokens": int(sum(event.metrics["sampled_tokens"] for event in steps.values())),
            "excluded": int(sum(event.metrics["excluded"] for event in steps.values())),
            "grad_clipped": fmean([event.metrics.get("grad_clipped", 0.0) for event in steps.values()] or [0.0]),
            "evaluations": curve,
            "settings": self.settings.model_dump(mode="json"),
        }


def evaluation_of(step: int, attempts: list[Attempt], threshold: float) -> EvaluationEvent:
    """Raises EvaluationFailed when no attempt has a reward: there is nothing to average."""
    rewards = rewards_of(attempts)
    if not rewards:
        causes = sorted({attempt.error for attempt in attempts})
        raise EvaluationFailed("no attempt could be finished: " + "; ".join(causes[:3]))
    success = fmean(reaches(reward, threshold) for reward in rewards)
    return EvaluationEvent(step, success, fmean(rewards), len(rewards), len(attempts) - len(rewards))
