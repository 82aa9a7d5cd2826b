"""One training run: the loop around the algorithm. It can be stopped at any point and goes on from its folder."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import structlog

from mulligan.common.disk import free_bytes
from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import PolicyInfo
from mulligan.common.tasks import PrioritySlots
from mulligan.common.tracing import span
from mulligan.trainer.activity import CurrentActivity
from mulligan.trainer.checked import CheckedRun, check_evaluator, check_run, open_served
from mulligan.trainer.checkpoints import CheckpointTimes
from mulligan.trainer.evaluations import EVALUATIONS_TAKE_LONG, Evaluations
from mulligan.trainer.events import EvaluationEvent, EventLog, NoticeEvent, StepEvent
from mulligan.trainer.folder import Checkpoint, RunFolder
from mulligan.trainer.harness import Harness
from mulligan.trainer.history import read_history, write_history
from mulligan.trainer.idle import FirstSteps
from mulligan.trainer.interfaces import EnvironmentPort, LearnerPort, MemoryPort, PolicyPort, Upload
from mulligan.trainer.journal import StepCompleted, journal_file, read_metrics
from mulligan.trainer.pipeline import Pipeline, StepSampling
from mulligan.trainer.player import Player
from mulligan.trainer.preflight import check_actor, check_memory, idle_notices
from mulligan.trainer.recall import newest, scope_of
from mulligan.trainer.rounds import Chooser
from mulligan.trainer.run_environment import RunEnvironments, RunTasks
from mulligan.trainer.run_metrics import step_ended
from mulligan.trainer.sampling import PublishedPolicy, ServedPolicy
from mulligan.trainer.settings import RunSettings
from mulligan.trainer.step import StepRunner
from mulligan.trainer.tracking import Tracking
from mulligan.trainer.trainable import drop_notices, prompt_notices, skip_notices

log = structlog.get_logger()
LEARNER_LOSSES = 3  # lost learners in a row, without a step between them, before the run fails
# While a disk is full: seconds between tries, seconds between looks at the disk, bytes beyond what was to be written.
_FIRST_DELAY_SECONDS = 0.5
_MAX_DELAY_SECONDS = 60.0
_LOOK_SECONDS = 0.5
_SPARE_BYTES = 2**18


@dataclass(frozen=True)
class ServicePorts:
    """The four ports of a run. `open_learner` takes (run id, settings) and creates a learner that the run owns; a run
    with `learner = "none"` never calls it.
    `memory_of` takes (run id, scope) and gives the memory with the run's credential; without it, that is `memory`.
    `upload` brings weights to a policy service that does not see the trainer's files; None if it sees them.
    `waiting` says for which of them calls wait now, and why."""

    environment: EnvironmentPort
    policy: PolicyPort
    memory: MemoryPort
    open_learner: Callable[[str, RunSettings], Awaitable[LearnerPort]]
    upload: Upload | None = None
    memory_of: Callable[[str, str], MemoryPort] | None = None
    waiting: Callable[[], Sequence[str]] = tuple

    async def actor(
        self, settings: RunSettings, learner: LearnerPort | None, notice: Callable[[str], None]
    ) -> PublishedPolicy | ServedPolicy:
        """The policy that the run trains, or only plays without a learner. Raises DomainError INVALID_SETTING,
        MODEL_MISMATCH or UNKNOWN_POLICY."""
        if learner is not None:
            return await self._published("actor", settings, learner, notice)
        return ServedPolicy(await open_served(self.policy, settings, "actor"))

    async def evaluator(
        self, settings: RunSettings, learner: LearnerPort | None, notice: Callable[[str], None], actor: PolicyInfo
    ) -> PublishedPolicy | None:
        """The policy that evaluations measure in place of the actor; None if that is the actor itself. Raises as
        `actor` does."""
        if learner is None or not settings.policies.evaluator:
            return None
        found = await self._published("evaluator", settings, learner, notice)
        check_evaluator(found.info, actor)
        return found

    async def _published(
        self, purpose: str, settings: RunSettings, learner: LearnerPort, notice: Callable[[str], None]
    ) -> PublishedPolicy:
        """A policy that the learner's weights are published to."""
        found = await open_served(self.policy, settings, purpose)
        check_actor(found.info, settings, learner.fingerprint, learner.adapted_layers, f"policies.{purpose}")
        return PublishedPolicy(found, learner, notice, self.upload, dtype=settings.model.dtype)


class Run:
    """`train` runs until the last step or `stop`. It raises whatever makes the run fail.

    It opens the environments and compares them with the run's fingerprints, checks what needs no learner (`check_run`),
    creates the learner, loads the last checkpoint, and publishes the weights. Each `_step` then samples (with the
    journal as recorder), learns, publishes, memorises and writes its metrics. With `learner = "none"` it leaves out
    what needs a learner. With `rollout.max_staleness` later steps are sampled meanwhile (`Pipeline`). Checkpoints come
    between steps, evaluations between or beside them (`Evaluations`). Where the learner is lost or a disk is full,
    `train` begins again at the last checkpoint; the journal has what was sampled since.

    `paused` says what the run waits for, a disk or services; "" while it trains. With `accept_environment`, the run
    goes on although the environment has changed.
    """

    def __init__(self, run_id: str, folder: RunFolder, services: ServicePorts, events: EventLog | None = None):
        self.run_id = run_id
        self.folder = folder
        self.record = folder.record()  # when the run was opened
        self.settings = folder.settings()
        self.services = services
        self.events = events or EventLog(folder.events_file)  # kept over stop and resume, for those who watch
        self._lacks_room = ""
        self.activity = CurrentActivity()
        self.beside = CurrentActivity()  # what it does at the same time: an evaluation with a policy of its own
        self.accept_environment = False
        self.environments = RunEnvironments(self.settings, folder, services.environment)
        self._pause = Pause()
        self._checkpoints = CheckpointTimes(self.settings.checkpoint_every, self.settings.keep_checkpoints)
        self._stop = asyncio.Event()
        self._finished = False
        self._first_steps = FirstSteps(self.settings)
        checkpoint = folder.checkpoint()
        self.step = checkpoint.step if checkpoint else 0

    def stop(self) -> None:
        """Ends training after the current step."""
        self._stop.set()

    def notice(self, text: str) -> None:
        log.info("notice", run_id=self.run_id, text=text)
        self.events.tell(NoticeEvent(text))

    def _notice_once(self, texts: list[str]) -> None:
        """Gives only the first notice of each kind in a run. The kind is the text before the colon."""
        notices = [entry.event.text for entry in self.events.entries if isinstance(entry.event, NoticeEvent)]
        told = {text.partition(":")[0] for text in notices}
        for text in texts:
            if text.partition(":")[0] not in told:
                self.notice(text)

    def _tell_once(self, text: str) -> None:
        self._notice_once([text])

    @property
    def paused(self) -> str:
        return self._lacks_room or ("; ".join(self.services.waiting()) if self.activity.now().doing else "")

    @property
    def train_seconds(self) -> float:
        return sum(event.metrics.get("seconds", 0.0) for event in self.events.steps().values())

    @property
    def last_step(self) -> int:
        return self.settings.steps

    @property
    def newest(self) -> tuple[StepEvent | None, EvaluationEvent | None]:
        """The last step, and the last evaluation in the run's own environment."""
        return self.events.newest

    @property
    def stopped(self) -> bool:
        return not self._finished

    async def train(self) -> None:
        """Trains from the last checkpoint on, and writes metrics where `tracking` says."""
        settings = self.settings
        plain = settings.model_dump(mode="json")
        async with Tracking(self.run_id, self.folder.path, settings.tracking, plain, self.events, self._tell_once):
            await self._train_through_losses()

    async def _train_through_losses(self) -> None:
        """Creates a lost learner again, and waits while a disk is full."""
        lost = 0
        while True:
            begun_at = self.step
            try:
                await self._train()
                return
            except DomainError as error:
                if error.reason is Reason.DISK_FULL:
                    if self.step > begun_at:
                        self._pause.over()
                    await self._wait_for_room(error)
                    if self._stop.is_set():
                        return
                    continue
                if error.reason not in (Reason.UNKNOWN_LEARNER, Reason.SEQUENCE_MISMATCH):
                    raise
                lost = 1 if self.step > begun_at else lost + 1
                if lost > LEARNER_LOSSES:
                    raise
                self.notice(f"the learner was lost ({error}); going on from the last checkpoint")

    async def _wait_for_room(self, full: DomainError) -> None:
        self._lacks_room = full.message
        self.notice(f"paused: {full.message}. The run goes on by itself when there is room")
        try:
            await self._pause.wait(full, self._stop)
        finally:
            self._lacks_room = ""
        if not self._stop.is_set():
            self.notice("there may be room again: going on from the last checkpoint")

    async def _train(self) -> None:
        self.events.write()
        self._notice_once(self.events.damage)
        self._notice_once(idle_notices(self.settings))
        self.activity.begin("opening the environments")
        tasks = await self.environments.open()
        await self.environments.settle(tasks, self.notice, accept=self.accept_environment)
        self.accept_environment = False
        chooser = await self._chooser(tasks)
        await check_memory(self.services.memory, self.settings, scope_of(self.settings, self.run_id))
        checked = await check_run(self.services.policy, self.settings, tasks)
        learner = None
        if self.settings.trains:
            self.activity.begin("creating the learner")
            log.info("creating the learner", run_id=self.run_id, model=self.settings.model.source)
            learner = await self.services.open_learner(self.run_id, self.settings)
        try:
            await self._train_with(learner, tasks, chooser, checked)
        finally:
            self.activity.begin("")
            if learner is not None:
                await learner.close()

    async def _chooser(self, tasks: Mapping[str, RunTasks]) -> Chooser:
        """Goes back to the last checkpoint. Raises what `Chooser.choose` raises where the sampler cannot choose."""
        checkpoint = self.folder.checkpoint()
        self.step = checkpoint.step if checkpoint else 0
        await self._restore_events()
        history = await asyncio.to_thread(read_history, self.folder, self.settings.environment, self.step)
        listed = {name: known.train for name, known in tasks.items()}
        chooser = Chooser(self.settings, listed, history, self.step)
        if self.step < self.settings.steps:
            chooser.choose(self.step)
        return chooser

    async def _restore_events(self) -> None:
        """Takes the metrics of steps from the journal whose events are lost, and says what is lost for good."""
        events = self.events.steps()
        missing = [step for step in range(self.step) if step not in events]
        for step in missing:
            metrics = await asyncio.to_thread(read_metrics, journal_file(self.folder.journal, step))
            if metrics is not None:
                self.events.add(StepEvent(step, metrics))
        every = self.settings.evaluation.every
        checkpoint = self.folder.checkpoint()
        under_way = {checkpoint.evaluation.step} if checkpoint and checkpoint.evaluation else set()
        evaluated = {0, *range(0, self.step, max(every or self.step, 1))} - under_way
        lost = {
            "metrics of steps": [step for step in missing if step not in self.events.steps()],
            "evaluations before steps": sorted(evaluated - self.events.evaluations().keys()),
        }
        told = [f"{what} {', '.join(map(str, steps))}" for what, steps in lost.items() if steps and self.step]
        if told:
            self._notice_once([f"lost from events.jsonl: {'; '.join(told)}. summary.json is without them"])

    async def _train_with(
        self, learner: LearnerPort | None, tasks: Mapping[str, RunTasks], chooser: Chooser, checked: CheckedRun
    ) -> None:
        settings = self.settings
        services = self.services
        actor = await services.actor(settings, learner, self.notice)
        checkpoint = self.folder.checkpoint()
        if checkpoint is not None and learner is not None:
            self.activity.begin("loading the checkpoint")
            await learner.load_checkpoint(checkpoint.name)
        incarnation = uuid.uuid4().hex[:8]
        restarts = settings.rollout.max_restarts
        harnesses = {
            name: Harness(port, actor, tasks[name].info, actor.info, incarnation, restarts, checked.speakers)
            for name, port in self.environments.ports.items()
        }
        evaluator = await services.evaluator(settings, learner, self.notice, actor.info)
        harness = harnesses[settings.environment]
        others = {name: one for name, one in harnesses.items() if one is not harness}
        memory = services.memory
        if services.memory_of is not None:
            memory = services.memory_of(self.run_id, scope_of(settings, self.run_id))
        runner = StepRunner(self.run_id, settings, harness, memory, learner, others=others)
        pipeline = Pipeline(runner, actor, self.environments, tasks, chooser, self.folder, self.notice)
        players = self._players(harnesses, tasks, evaluator, pipeline, checked)
        evaluations = Evaluations(
            self.run_id,
            settings,
            players,
            actor,
            evaluator,
            self.events,
            self.activity if evaluator is None else self.beside,
            self._notice_once,
            partial(newest, services.memory, settings, self.run_id),
            checkpoint.evaluation if checkpoint is not None else None,
        )
        await self._publish(actor)
        self._checkpoints = CheckpointTimes(settings.checkpoint_every, settings.keep_checkpoints)
        if checkpoint is None:
            await self._save(runner, evaluations)
        async with evaluations, pipeline:
            self.activity.begin("starting an evaluation")
            await evaluations.go_on()
            await self._loop(runner, actor, pipeline, evaluations)
        if self.step == settings.steps:
            self.folder.write_summary(self.summary())
            self._finished = True

    async def _loop(
        self,
        runner: StepRunner,
        actor: PublishedPolicy | ServedPolicy,
        pipeline: Pipeline,
        evaluations: Evaluations,
    ) -> None:
        """Steps, evaluations, checkpoints. An evaluation that runs beside training is over before the next one. A
        checkpoint does not wait for it, but has what repeats it. An evaluation that fails ends the run before the next
        step."""
        settings = self.settings
        begun_at = self.step
        while self.step < settings.steps and not self._stop.is_set():
            if evaluations.is_due(self.step):
                await self._wait_for(evaluations, tells=self.step > begun_at)
            evaluations.check()
            if self._checkpoints.is_due:
                await self._save(runner, evaluations)
            if evaluations.is_due(self.step):
                self.activity.begin("starting an evaluation")
                await evaluations.begin(self.step)
            await self._step(actor, pipeline)
        if self.step > begun_at:
            await self._save(runner, evaluations)
        await self._wait_for(evaluations)
        if self.step == settings.steps:
            self.activity.begin("starting an evaluation")
            await evaluations.begin(self.step)
            await self._wait_for(evaluations)

    async def _wait_for(self, evaluations: Evaluations, *, tells: bool = False) -> None:
        """Waits for the evaluation that runs beside training, if one does. Raises what it raised."""
        if evaluations.under_way:
            self.activity.begin("waiting for the evaluation")
            if tells:
                self._tell_once(EVALUATIONS_TAKE_LONG)
        await evaluations.finish()

    async def _publish(self, policy: PublishedPolicy | ServedPolicy) -> None:
        if self.settings.trains:
            self.activity.begin("publishing the weights")
        await policy.publish()

    async def _step(self, policy: PublishedPolicy | ServedPolicy, pipeline: Pipeline) -> None:
        """Samples, learns, publishes, memorises. A repeated step finds its samples in the journal."""
        start = _clock()
        self.activity.begin("beginning a step")
        await pipeline.admit(self.step)
        sampling = pipeline.sampling(self.step)
        with sampling.span:
            await self._train_step(policy, pipeline, sampling, start)

    async def _train_step(
        self, policy: PublishedPolicy | ServedPolicy, pipeline: Pipeline, sampling: StepSampling, start: float
    ) -> None:
        journal = sampling.journal
        runner = sampling.runner
        chains = self.settings.rollout.tasks_per_step * self.settings.rollout.rollouts_per_task
        self.activity.begin("sampling chains", lambda: (journal.experiences, chains))
        step = await pipeline.take(self.step)
        sampled = _clock()
        journal.sync()
        first = [experience.samples[0] for experience in step.experiences if experience.samples]
        later = [sample for experience in step.experiences for sample in experience.samples[1:]]
        self._notice_once(prompt_notices(first, later))
        metrics = runner.metrics(step.experiences) | step.metrics | pipeline.staleness(self.step, step.kept)
        if self.settings.trains:
            self.activity.begin("learning")
            with span("learn"):
                metrics |= await runner.learn(self.step, step.kept, self.activity.begin)
            self._notice_once([*drop_notices(metrics), *skip_notices(metrics)])
        if told := self._first_steps.notice(self.step, has_learned=runner.has_taught(step.kept)):
            self._tell_once(told)
        learned = _clock()
        with span("publish"):
            await self._publish(policy)
        self.activity.begin("writing to the memory")
        with span("memorise"):
            await runner.memorise(step.kept, step.replaced, rewrites=journal.completed is None)
        metrics |= {
            "policy_version": float(policy.version),
            "seconds": _clock() - start,
            "sample_seconds": sampling.ended - sampling.began,
            "learn_seconds": learned - sampled,
        }
        if self.settings.rollout.max_staleness:
            metrics |= {
                "waiting_for_rollouts_seconds": sampled - start,
                "waiting_for_learner_seconds": sampling.waited,
            }
        if policy.canary_difference is not None:
            metrics["canary_difference"] = policy.canary_difference
        if journal.completed is None:
            journal.finish(StepCompleted(self.step, metrics))
        journal.sync()
        pipeline.close(self.step)
        write_history(self.folder, self.step, step.rounds)
        if self.step not in self.events.steps():
            step_ended(metrics)
            self.events.add(StepEvent(self.step, metrics))
        self.step += 1
        self._checkpoints.stepped(self.step, _clock() - sampled)

    async def _save(self, runner: StepRunner, evaluations: Evaluations) -> None:
        self.activity.begin("saving a checkpoint")
        start = _clock()
        step = self.step
        name = f"{self.run_id}-{step:06}"
        if runner.learner is not None:
            await runner.learner.save_checkpoint(name)
        memory_version = await self.services.memory.snapshot(runner.memory_scope)
        self.events.sync()  # first: a run that goes on from the checkpoint does not make earlier events again
        self.folder.write_checkpoint(Checkpoint(name, step, memory_version, evaluations.unfinished))
        self._checkpoints.saved(_clock() - start)

    def _players(
        self,
        harnesses: Mapping[str, Harness],
        tasks: Mapping[str, RunTasks],
        evaluator: PublishedPolicy | None,
        pipeline: Pipeline,
        checked: CheckedRun,
    ) -> dict[str, Player]:
        """What plays the evaluations in each environment. The actor's share the slots of the rollouts."""
        settings = self.settings
        threshold = settings.algorithm.success_threshold
        players = {}
        for (name, known), evaluation in zip(tasks.items(), checked.evaluations, strict=True):
            harness = harnesses[name]
            slots = pipeline.slots
            if evaluator is not None:
                harness = replace(harness, policy=evaluator, policy_info=evaluator.info)
                slots = PrioritySlots(settings.rollout.concurrency)
            players[name] = Player(
                harness,
                known.test,
                evaluation,
                settings.rollout,
                settings.seed,
                threshold,
                writers=checked.writers,
                slots=slots,
            )
        return players

    def summary(self) -> dict[str, object]:
        """The content of summary.json. `rollouts` is the number of episodes and reflections, the budget for comparing
        algorithms; `grad_clipped` is the share of optimizer steps with a gradient norm above `max_grad_norm`;
        `not_finite` is the number of those that were skipped for a gradient or loss that is not finite. Test success is
        that in the run's own environment; `further_evaluations` has the others'. A measurement that is lost from
        events.jsonl is None, and sums are without it."""
        evaluations = self.events.evaluations()
        steps = self.events.steps()
        others = [name for name in self.settings.environments if name != self.settings.environment]
        summary: dict[str, object] = {
            "run_id": self.run_id,
            "test_success_before": evaluations[0].success if 0 in evaluations else None,
            "test_success_after": evaluations[self.step].success if self.step in evaluations else None,
            "train_seconds": self.train_seconds,
            "steps": self.step,
            "rollouts": int(sum(event.metrics["rollouts"] for event in steps.values())),
            "sampled_tokens": int(sum(event.metrics["sampled_tokens"] for event in steps.values())),
            "excluded": int(sum(event.metrics["excluded"] for event in steps.values())),
            "not_finite": int(sum(event.metrics.get("not_finite", 0.0) for event in steps.values())),
            "grad_clipped": fmean([event.metrics.get("grad_clipped", 0.0) for event in steps.values()] or [0.0]),
            "evaluations": self._curve(),
            "settings": self.settings.model_dump(mode="json"),
        }
        return summary | ({"further_evaluations": {name: self._curve(name) for name in others}} if others else {})

    def _curve(self, environment: str = "") -> list[dict[str, object]]:
        steps = self.events.steps()
        return [
            {
                "step": step,
                "rollouts": int(sum(steps[earlier].metrics["rollouts"] for earlier in range(step) if earlier in steps)),
                "success": evaluation.success,
            }
            | ({"metrics": evaluation.metrics} if evaluation.metrics else {})
            for step, evaluation in sorted(self.events.evaluations(environment).items())
        ]


class Pause:
    """Waits for room on a disk between the tries of a run, longer after each. `over` begins with short waits again."""

    def __init__(self) -> None:
        self._delay = _FIRST_DELAY_SECONDS

    def over(self) -> None:
        self._delay = _FIRST_DELAY_SECONDS

    async def wait(self, full: DomainError, stop: asyncio.Event) -> None:
        """Returns when the disk seems to have room for what failed with DISK_FULL, or `stop` is set.

        Free space may be misleading (a quota, another machine's disk). So it also returns after a while, for a try.
        """
        folder = Path(full.metadata["folder"])
        wanted = max(int(full.metadata["needed_bytes"]), int(full.metadata["free_bytes"]) + 1) + _SPARE_BYTES
        end = time.monotonic() + _MAX_DELAY_SECONDS
        await _set(stop, self._delay)
        while not stop.is_set() and time.monotonic() < end and free_bytes(folder) < wanted:
            await _set(stop, _LOOK_SECONDS)
        self._delay = min(2 * self._delay, _MAX_DELAY_SECONDS)


async def _set(event: asyncio.Event, seconds: float) -> None:
    """Waits until the event is set, for at most `seconds`."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return


def _clock() -> float:
    return asyncio.get_running_loop().time()
