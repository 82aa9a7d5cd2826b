"""One training run: the loop around the algorithm. It can be stopped at any point and goes on from its folder."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import structlog

from mulligan.common.disk import free_bytes
from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import PolicyInfo
from mulligan.trainer.activity import CurrentActivity
from mulligan.trainer.evaluation import evaluate, fit_protocols, measure, open_writers
from mulligan.trainer.events import EventLog, NoticeEvent, StepEvent
from mulligan.trainer.folder import Checkpoint, RunFolder
from mulligan.trainer.harness import Harness
from mulligan.trainer.history import read_history, write_history
from mulligan.trainer.interfaces import EnvironmentPort, LearnerPort, MemoryPort, PolicyPort, Upload
from mulligan.trainer.journal import StepCompleted, StepJournal, StepStarted, set_aside
from mulligan.trainer.player import Player
from mulligan.trainer.preflight import check_actor, check_algorithm, check_environment, check_speaker, named_by
from mulligan.trainer.rounds import Chooser, SampledStep, sample_rounds
from mulligan.trainer.run_environment import EnvironmentChanged, RunEnvironments, RunTasks
from mulligan.trainer.sampling import NamedPolicy, PublishedPolicy
from mulligan.trainer.settings import RunSettings
from mulligan.trainer.step import StepRunner
from mulligan.trainer.trainable import drop_notices, prompt_notices

log = structlog.get_logger()
LEARNER_LOSSES = 3  # lost learners in a row, without a step between them, before the run fails
# While a disk is full: seconds between tries, seconds between looks at the disk, bytes beyond what was to be written.
_FIRST_DELAY_SECONDS = 0.5
_MAX_DELAY_SECONDS = 60.0
_LOOK_SECONDS = 0.5
_SPARE_BYTES = 2**18


@dataclass(frozen=True)
class ServicePorts:
    """The four ports of a run. `open_learner` takes (run id, settings) and creates a learner that the run owns.
    `upload` brings weights to a policy service that does not see the trainer's files; None if it sees them."""

    environment: EnvironmentPort
    policy: PolicyPort
    memory: MemoryPort
    open_learner: Callable[[str, RunSettings], Awaitable[LearnerPort]]
    upload: Upload | None = None

    async def actor(
        self, settings: RunSettings, learner: LearnerPort, notice: Callable[[str], None]
    ) -> PublishedPolicy:
        """The policy that the run trains. Raises DomainError INVALID_SETTING, MODEL_MISMATCH or UNKNOWN_POLICY."""
        with named_by("policies.actor"):
            found = await NamedPolicy.open(self.policy, settings.policies.actor)
        check_actor(found.info, settings, learner.fingerprint, learner.adapted_layers)
        return PublishedPolicy(found, learner, notice, self.upload, dtype=settings.model.dtype)

    async def speakers(self, settings: RunSettings, actor: PolicyInfo) -> dict[str, NamedPolicy]:
        """The other policies that write texts. Raises DomainError INVALID_SETTING or UNKNOWN_POLICY."""
        found = {}
        for purpose in ("reflector", "judge"):
            if name := getattr(settings.policies, purpose):
                with named_by(f"policies.{purpose}"):
                    found[purpose] = await NamedPolicy.open(self.policy, name)
                check_speaker(purpose, found[purpose].info, actor)
        return found


class Run:
    """`train` runs until the last step or `stop`. It raises whatever makes the run fail.

    It opens the environments and compares them with the run's fingerprints, creates the learner, loads the last
    checkpoint, and publishes the weights. Each `_step` then samples (with the journal as recorder), learns, publishes,
    memorises and writes its metrics. Evaluations and checkpoints come between steps. Where the learner is lost or a
    disk is full, `train` begins again at the last checkpoint; the journal has what was sampled since.

    `paused` says what the run waits for; "" while it trains. With `accept_environment`, the run goes on although the
    environment has changed.
    """

    def __init__(self, run_id: str, folder: RunFolder, services: ServicePorts, events: EventLog | None = None):
        self.run_id = run_id
        self.folder = folder
        self.record = folder.record()  # when the run was opened
        self.settings = folder.settings()
        self.services = services
        self.events = events or EventLog(folder.events_file)  # kept over stop and resume, for those who watch
        self.paused = ""
        self.activity = CurrentActivity()
        self.accept_environment = False
        self.environments = RunEnvironments(self.settings, folder, services.environment)
        self._pause = Pause()
        self._stop = asyncio.Event()
        self._finished = False
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

    @property
    def train_seconds(self) -> float:
        return sum(event.metrics.get("seconds", 0.0) for event in self.events.steps().values())

    @property
    def stopped(self) -> bool:
        return not self._finished

    async def train(self) -> None:
        """Trains from the last checkpoint on. Creates a lost learner again, and waits while a disk is full."""
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
        self.paused = full.message
        self.notice(f"paused: {full.message}. The run goes on by itself when there is room")
        try:
            await self._pause.wait(full, self._stop)
        finally:
            self.paused = ""
        if not self._stop.is_set():
            self.notice("there may be room again: going on from the last checkpoint")

    async def _train(self) -> None:
        self.events.write()
        self.activity.begin("opening the environments")
        tasks = await self.environments.open()
        await self.environments.settle(tasks, self.notice, accept=self.accept_environment)
        self.accept_environment = False
        chooser = await self._chooser(tasks)
        self.activity.begin("creating the learner")
        log.info("creating the learner", run_id=self.run_id, model=self.settings.model.source)
        learner = await self.services.open_learner(self.run_id, self.settings)
        try:
            await self._train_with(learner, tasks, chooser)
        finally:
            self.activity.begin("")
            await learner.close()

    async def _chooser(self, tasks: Mapping[str, RunTasks]) -> Chooser:
        """Goes back to the last checkpoint. Raises what `Chooser.choose` raises where the sampler cannot choose."""
        checkpoint = self.folder.checkpoint()
        self.step = checkpoint.step if checkpoint else 0
        history = await asyncio.to_thread(read_history, self.folder, self.settings.environment, self.step)
        chooser = Chooser(self.settings, {name: known.train for name, known in tasks.items()}, history)
        if self.step < self.settings.steps:
            chooser.choose(self.step)
        return chooser

    async def _train_with(self, learner: LearnerPort, tasks: Mapping[str, RunTasks], chooser: Chooser) -> None:
        settings = self.settings
        services = self.services
        actor = await services.actor(settings, learner, self.notice)
        for name, field in settings.environments.items():
            check_environment(tasks[name].info, actor.info, field)
        speakers = await services.speakers(settings, actor.info)
        checkpoint = self.folder.checkpoint()
        if checkpoint is not None:
            await learner.load_checkpoint(checkpoint.name)
        incarnation = uuid.uuid4().hex[:8]
        restarts = settings.rollout.max_restarts
        harnesses = {
            name: Harness(port, actor, tasks[name].info, actor.info, incarnation, restarts, speakers)
            for name, port in self.environments.ports.items()
        }
        players = await self._players(harnesses, tasks)
        harness = harnesses.pop(settings.environment)
        runner = StepRunner(self.run_id, settings, harness, services.memory, learner, others=harnesses)
        for known in tasks.values():
            check_algorithm(runner.algorithm, known.info, actor.info, speakers)
        self.activity.begin("publishing the weights")
        await actor.publish()
        if checkpoint is None:
            await self._save(runner, 0)
        while self.step < settings.steps and not self._stop.is_set():
            if self._evaluation_due():
                await self._evaluate(players)
            await self._step(runner, actor, tasks, chooser)
            if self.step % settings.checkpoint_every == 0 or self.step == settings.steps or self._stop.is_set():
                await self._save(runner, self.step)
        if self.step == settings.steps:
            await self._evaluate(players)
            self.folder.write_summary(self.summary())
            self._finished = True

    async def _step(
        self, runner: StepRunner, policy: PublishedPolicy, tasks: Mapping[str, RunTasks], chooser: Chooser
    ) -> None:
        """Samples, learns, publishes, memorises. A repeated step finds its samples in the journal."""
        start = time.monotonic()
        journal = StepJournal(self.folder.journal, self.step)
        try:
            recording = replace(runner, recorder=journal)
            chains = self.settings.rollout.tasks_per_step * self.settings.rollout.rollouts_per_task
            self.activity.begin("sampling chains", lambda: (journal.experiences, chains))
            step = await self._sample(recording, journal, policy.version, tasks, chooser)
            sampled = time.monotonic()
            journal.sync()
            first = [experience.samples[0] for experience in step.experiences if experience.samples]
            later = [sample for experience in step.experiences for sample in experience.samples[1:]]
            self._notice_once(prompt_notices(first, later))
            metrics = recording.metrics(step.experiences) | step.metrics
            minibatches = self.settings.algorithm.optimizer_steps
            self.activity.begin("learning", lambda: (recording.minibatches_learned, minibatches))
            metrics |= await recording.learn(self.step, step.kept)
            self._notice_once(drop_notices(metrics))
            learned = time.monotonic()
            self.activity.begin("publishing the weights")
            await policy.publish()
            await recording.memorise(step.kept)
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
        write_history(self.folder, self.step, step.rounds)
        if self.step not in self.events.steps():
            self.events.add(StepEvent(self.step, metrics))
        self.step += 1

    async def _sample(
        self,
        recording: StepRunner,
        journal: StepJournal,
        version: int,
        tasks: Mapping[str, RunTasks],
        chooser: Chooser,
    ) -> SampledStep:
        """Raises EnvironmentChanged when an environment changed meanwhile; then the step's attempts are not used."""
        if journal.started is None:
            task_ids, environments = chooser.named(choice := chooser.choose(self.step))
            memory_version = await self.services.memory.snapshot(recording.memory_scope)
            journal.start(StepStarted(self.step, task_ids, memory_version, version, environments, choice.horizon))
        known = journal.experiences
        try:
            sampled = await sample_rounds(recording, journal, chooser)
            if journal.experiences > known:
                await self.environments.check(tasks)
        except EnvironmentChanged:
            set_aside(self.folder.journal, self.step)
            raise
        return sampled

    async def _save(self, runner: StepRunner, step: int) -> None:
        name = f"{self.run_id}-{step:06}"
        await runner.learner.save_checkpoint(name)
        memory_version = await self.services.memory.snapshot(runner.memory_scope)
        self.folder.write_checkpoint(Checkpoint(name, step, memory_version))

    def _evaluation_due(self) -> bool:
        every = self.settings.evaluation.every
        return self.step == 0 or (every > 0 and self.step % every == 0)

    async def _players(self, harnesses: Mapping[str, Harness], tasks: Mapping[str, RunTasks]) -> dict[str, Player]:
        """What plays the evaluations in each environment. Raises DomainError INVALID_SETTING and UNKNOWN_POLICY."""
        settings = self.settings
        places = [(known.info, known.test) for known in tasks.values()]
        fitting = fit_protocols(places, settings.evaluation, "evaluation.")
        writers = await open_writers(self.services.policy, settings.evaluation, "evaluation.")
        threshold = settings.algorithm.success_threshold
        return {
            name: Player(
                harnesses[name], known.test, evaluation, settings.rollout, settings.seed, threshold, writers=writers
            )
            for (name, known), evaluation in zip(tasks.items(), fitting, strict=True)
        }

    async def _evaluate(self, players: Mapping[str, Player]) -> None:
        """Measures the policy in each environment, unless that was done before."""
        for place, (environment, player) in enumerate(players.items()):
            told_as = environment if place else ""  # empty for the run's own
            if self.step in self.events.evaluations(told_as):
                continue
            log.info("evaluating", run_id=self.run_id, step=self.step, environment=environment, tasks=len(player.tasks))
            name = f"{self.run_id}-evaluation-{self.step}" + (f"-e{place}" if place else "")
            named = replace(player, name=name)
            self.activity.begin("evaluating attempts", partial(_counted, named))
            attempts = await evaluate(named)
            self._notice_once(prompt_notices(attempts))
            self.events.add(await measure(named, self.step, attempts, told_as))

    def summary(self) -> dict[str, object]:
        """The content of summary.json. `rollouts` is the number of episodes and reflections, the budget for comparing
        algorithms; `grad_clipped` is the share of optimizer steps with a gradient norm above `max_grad_norm`. Test
        success is that in the run's own environment; `further_evaluations` has the others'."""
        evaluations = self.events.evaluations()
        steps = self.events.steps()
        others = [name for name in self.settings.environments if name != self.settings.environment]
        summary: dict[str, object] = {
            "run_id": self.run_id,
            "test_success_before": evaluations[0].success,
            "test_success_after": evaluations[self.step].success,
            "train_seconds": self.train_seconds,
            "steps": self.step,
            "rollouts": int(sum(event.metrics["rollouts"] for event in steps.values())),
            "sampled_tokens": int(sum(event.metrics["sampled_tokens"] for event in steps.values())),
            "excluded": int(sum(event.metrics["excluded"] for event in steps.values())),
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
                "rollouts": int(sum(steps[earlier].metrics["rollouts"] for earlier in range(step))),
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


def _counted(player: Player) -> tuple[int, int]:
    """The attempts of an evaluation that have ended, and all of them."""
    return player.progress.ended, player.progress.total
