"""The runs of one trainer: starts, stops and resumes them, one at a time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from weakref import WeakValueDictionary

import structlog
from cachetools import LRUCache

from mulligan.common.errors import DomainError, Reason, incident, invalid_field
from mulligan.common.file_lock import lock_file
from mulligan.common.files import make_folder
from mulligan.common.state_files import state_damaged
from mulligan.common.tasks import cancel, is_asked_to_end, to_its_end
from mulligan.common.tracing import untraced
from mulligan.common.types import Split
from mulligan.trainer.checked import open_served
from mulligan.trainer.evaluation import evaluate, fit_protocols, measure, open_writers
from mulligan.trainer.events import EvaluationEvent, StateEvent
from mulligan.trainer.failures import told_of, words_of
from mulligan.trainer.folder import RunFolder, RunRecord, RunState
from mulligan.trainer.harness import Harness
from mulligan.trainer.metrics import EvaluationProgress
from mulligan.trainer.player import Player
from mulligan.trainer.preflight import check_environment, check_tasks, check_top_k
from mulligan.trainer.recall import GLOBAL_SCOPE, newest
from mulligan.trainer.run import Run, ServicePorts
from mulligan.trainer.run_environment import ADVICE, EnvironmentChanged, KnownEnvironment
from mulligan.trainer.run_metrics import run_ended
from mulligan.trainer.sampling import NamedPolicy, PublishedPolicy
from mulligan.trainer.settings import EvaluationSettings, RolloutSettings, RunSettings
from mulligan.trainer.trainable import prompt_notices
from mulligan.trainer.wire import settings_to_proto

log = structlog.get_logger()
_RECENT_EVENTS = 200_000  # of runs that are kept in memory; one has a few kilobytes
_NO_CLOCK = datetime(3000, 1, 1, tzinfo=UTC)  # a later time is a damaged one
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_run_id(run_id: str) -> None:
    """Raises INVALID_FIELD for what cannot be the id of a run."""
    if not _RUN_ID.fullmatch(run_id):
        raise invalid_field("run_id", "1 to 64 letters, digits, '.', '_' and '-', the first a letter or digit")


class RunManager:
    """Keeps one folder per run below `folder`, and trains at most one run at a time.

    `start` creates the run's folder, `resume` opens it again; both call `_drive`, which trains the run in a task. When
    that ends, `_end` writes the state COMPLETED, STOPPED or FAILED and tells the watchers. A run that is RUNNING on
    disk when the trainer starts is continued (`go_on`). `publish` and `evaluate` measure without training.

    Raises OSError when another process owns `folder`.
    """

    def __init__(self, folder: Path, services: ServicePorts):
        make_folder(folder)
        self._folder = folder
        self._services = services
        self._runs: WeakValueDictionary[str, Run] = WeakValueDictionary()  # one object each, for all who use it
        self._recent: LRUCache[str, Run] = LRUCache(_RECENT_EVENTS, getsizeof=_size)  # those to keep though nobody does
        self._unwritten: dict[str, RunRecord] = {}  # final states that could not be written yet
        self._unsynced: dict[str, Run] = {}  # their runs, as far as they were open, with events that may not be either
        self._strange: set[str] = set()  # folders that cannot be runs, of which the log has told
        self._resuming = asyncio.Lock()
        self._active: asyncio.Task[None] | None = None
        self._active_id = ""
        self._busy_with = ""  # a run that is checked or published, but not trained
        self._draining = False
        try:
            self._lock = lock_file(folder / ".lock")
        except BlockingIOError:
            raise OSError(f"runs_folder: {folder} is in use by another trainer") from None

    def go_on(self) -> None:
        """Continues the run that was running when the trainer ended."""
        for run_id in self.run_ids():
            try:
                state = self.record(run_id).state
            except Exception as error:
                log.error("a run cannot be read", run_id=run_id, incident=incident(error), exc_info=error)
                continue
            if state is RunState.RUNNING and self._active is None:
                log.info("going on with a run", run_id=run_id)
                try:
                    self._drive(self._open(run_id))
                except Exception as error:  # noqa: BLE001
                    self._fail(run_id, error)

    def _fail(self, run_id: str, error: Exception) -> None:
        """Writes that a run cannot go on, which is not even open."""
        log.error("a run cannot go on", run_id=run_id, incident=incident(error), exc_info=error)
        self._unwritten[run_id] = self.record(run_id).now(RunState.FAILED, words_of(error), told_of(error))
        self._write_down(run_id)

    def run_ids(self) -> list[str]:
        """Newest first."""
        found = self._on_disk() | self._unwritten.keys()
        found |= {self._active_id} if self._is_active(self._active_id) else set()
        return sorted(found, key=lambda run_id: (self._created(run_id), run_id), reverse=True)

    def _on_disk(self) -> set[str]:
        """The folders that are runs: those that are called as a run may be. Of others the log tells once."""
        try:
            names = sorted(os.listdir(self._folder))
        except FileNotFoundError:
            names = []
        self._strange.intersection_update(names)
        found = set()
        for name in names:
            if not RunFolder(self._folder / name).exists:
                continue
            if _RUN_ID.fullmatch(name):
                found.add(name)
            elif name not in self._strange:
                self._strange.add(name)
                log.warning("a folder is no run, because no run can have its name", folder=str(self._folder / name))
        return found

    def record(self, run_id: str) -> RunRecord:
        """Raises UNKNOWN_RUN and STATE_DAMAGED."""
        if self._is_active(run_id):
            return self._runs[run_id].record.now(RunState.RUNNING)
        if run_id in self._unwritten:
            self._write_down(run_id)
        return self._unwritten.get(run_id) or _own_record(self._run_folder(run_id))

    def run(self, run_id: str) -> Run:
        """Raises UNKNOWN_RUN, STATE_DAMAGED, and INVALID_SETTING where a plug-in of its settings is no longer there."""
        if run_id not in self._unwritten and not self._is_active(run_id):
            self._run_folder(run_id)
        found = self._runs.get(run_id)
        if found is None:
            return self._open(run_id)
        self._recent[run_id] = found  # it may have more events by now
        return found

    @property
    def active(self) -> Run | None:
        """The run that trains, if one does."""
        return self._runs.get(self._active_id) if self._is_active(self._active_id) else None

    def exists(self, run_id: str) -> bool:
        return bool(_RUN_ID.fullmatch(run_id)) and RunFolder(self._folder / run_id).exists

    def start(self, run_id: str, settings: RunSettings) -> Run:
        check_run_id(run_id)
        folder = RunFolder(self._folder / run_id)
        if folder.exists:
            _own_record(folder)
            if folder.settings() != settings:
                raise DomainError(Reason.RUN_CONFLICT, f"run {run_id} exists with other settings")
            return self.run(run_id)
        if run_id == GLOBAL_SCOPE:  # a run of an earlier release that has this id goes on
            raise invalid_field("run_id", f"another one: {run_id!r} is the scope of the memory that runs share")
        self._refuse_a_second()
        folder.create(run_id, settings, self._now())
        self._unwritten.pop(run_id, None)
        self._runs.pop(run_id, None)  # from a folder that was removed
        self._unsynced.pop(run_id, None)
        run = self._open(run_id)
        self._drive(run)
        return run

    def stop(self, run_id: str) -> Run:
        run = self.run(run_id)
        if self._is_active(run_id):
            run.stop()
        return run

    async def resume(self, run_id: str, *, accept_environment: bool = False) -> Run:
        """Raises what `run` does, RUN_COMPLETED, LEARNER_OWNED, DISK_FULL, and ENVIRONMENT_CHANGED unless accepted."""
        async with self._resuming:
            record = self.record(run_id)
            if self._is_active(run_id):
                return self.run(run_id)
            if record.state is RunState.COMPLETED:
                raise DomainError(Reason.RUN_COMPLETED, f"run {run_id} is complete")
            folder = self._run_folder(run_id)
            self._refuse_a_second()
            run = self._open(run_id)
            run.accept_environment = accept_environment
            if not accept_environment:
                self._busy_with = run_id
                try:
                    await run.environments.refuse_others()
                finally:
                    self._busy_with = ""
            folder.write_record(record.now(RunState.RUNNING))
            self._unwritten.pop(run_id, None)
            self._drive(run)
            return run

    def notice(self, text: str) -> None:
        """Gives a notice to the watchers of the current run."""
        if self._active is not None and not self._active.done():
            self._runs[self._active_id].notice(text)

    async def drain(self, seconds: float) -> None:
        """Ends the current run after its step, or within the step after `seconds`.

        The run stays RUNNING on disk, so the next start continues it. It deletes its learner at the end, so this server
        must still be up.
        """
        self._draining = True
        if self._active is not None and not self._active.done():
            self._runs[self._active_id].stop()
            await asyncio.wait([self._active], timeout=seconds)
            await self._cancel()

    async def close(self) -> None:
        await self._cancel()
        self._lock.close()

    async def _cancel(self) -> None:
        await cancel(self._active)

    async def publish(self, run_id: str) -> None:
        """Makes the run's actor serve the run's last checkpoint. A run without a learner has no weights to serve.

        Raises CHECKPOINT_NOT_FOUND, LEARNER_OWNED, and the errors of preflight.
        """
        run = self.run(run_id)
        if not run.settings.trains:
            return
        checkpoint = run.folder.checkpoint()
        if checkpoint is None:
            raise DomainError(Reason.CHECKPOINT_NOT_FOUND, f"run {run_id} has no checkpoint yet")
        self._refuse_a_second()
        self._busy_with = run_id
        try:
            await open_served(self._services.policy, run.settings, "actor")
            learner = await self._services.open_learner(run_id, run.settings)
            try:
                await learner.load_checkpoint(checkpoint.name)
                actor = await self._services.actor(run.settings, learner, run.notice)
                assert isinstance(actor, PublishedPolicy), "there is a learner"
                if checkpoint.evaluation is not None:  # the run goes on with its weights
                    actor.keeps = (checkpoint.evaluation.weights.policy_version,)
                await actor.publish()
            finally:
                await to_its_end(learner.close())  # it holds a place; the caller may leave at this very moment
        finally:
            self._busy_with = ""

    async def evaluate(
        self,
        environment: str,
        settings: EvaluationSettings,
        rollout: RolloutSettings,
        seed: int,
        threshold: float,
        policy: str = "",
        run_id: str = "",
        tell: Callable[[EvaluationProgress], None] = lambda progress: None,
    ) -> tuple[EvaluationEvent, int]:
        """Evaluates a policy as it serves now, or a run's actor after `publish`, with the run's memory where its first
        attempts read it. Returns the result and its version.

        Raises UNKNOWN_POLICY, INVALID_SETTING, ENVIRONMENT_CHANGED.
        """
        port = KnownEnvironment(self._services.environment)
        run = self.run(run_id) if run_id else None
        info = await port.describe(environment)
        tasks = await port.list_tasks(environment, Split.TEST, settings.tasks)
        check_tasks(info, {Split.TEST: tasks})
        fit_protocols([(info, tasks)], settings)
        writers = await open_writers(self._services.policy, settings)
        policy = policy if run is None else run.settings.policies.actor
        named = await NamedPolicy.open(self._services.policy, policy)
        check_environment(info, named.info)
        check_top_k(named.info, settings.top_k, "top_k")
        if run is not None:
            await self.publish(run_id)
            named = await NamedPolicy.open(self._services.policy, policy)
        harness = Harness(port, named, info, named.info, "0", rollout.max_restarts)
        name = f"evaluation-{os.urandom(4).hex()}"
        recall = None if run is None else await newest(self._services.memory, run.settings, run_id)
        player = Player(harness, tasks, settings, rollout, seed, threshold, writers, name, tell, recall=recall)
        try:
            attempts = await evaluate(player)
            for text in prompt_notices(attempts):
                log.warning(text, environment=environment, policy=named.info.name)
            return await measure(player, 0, attempts), named.info.policy_version
        except EnvironmentChanged as error:
            raise DomainError(Reason.ENVIRONMENT_CHANGED, str(error), environment=environment) from error

    def _run_folder(self, run_id: str) -> RunFolder:
        folder = RunFolder(self._folder / run_id)
        if not _RUN_ID.fullmatch(run_id) or not folder.exists:
            raise DomainError(Reason.UNKNOWN_RUN, f"there is no run {run_id!r}", run_id=run_id)
        return folder

    def _open(self, run_id: str) -> Run:
        known = self._runs.get(run_id)
        events = known.events if known else None
        folder = RunFolder(self._folder / run_id)
        _own_record(folder)
        run = Run(run_id, folder, self._services, events)
        settings_to_proto(run.settings)  # of a changed file: numbers that no caller could have sent
        self._runs[run_id] = self._recent[run_id] = run
        return run

    def _is_active(self, run_id: str) -> bool:
        return self._active is not None and not self._active.done() and self._active_id == run_id

    def _refuse_a_second(self) -> None:
        busy = self._active_id if self._active is not None and not self._active.done() else self._busy_with
        if busy:
            message = f"this trainer trains run {busy}; stop it first, or start another trainer"
            raise DomainError(Reason.LEARNER_OWNED, message, run_id=busy)

    def _drive(self, run: Run) -> None:
        """Trains the run in a task. Its record must say RUNNING."""
        self._active_id = run.run_id
        run.events.tell(StateEvent(RunState.RUNNING))
        self._active = asyncio.create_task(self._train(run), name=f"run {run.run_id}", context=untraced())

    async def _train(self, run: Run) -> None:
        try:
            await run.train()
        except asyncio.CancelledError as error:
            if is_asked_to_end():
                raise
            self._end(run, RunState.FAILED, "something that the run waited for was cancelled, and nobody asked for it")
            log.error("run failed", run_id=run.run_id, exc_info=error)
        except Exception as error:  # any error is the run's state; the trainer serves on
            self._end(run, RunState.FAILED, *_cause(run, error))
            log.error("run failed", run_id=run.run_id, incident=incident(error), exc_info=error)
        else:
            if not run.stopped:
                self._end(run, RunState.COMPLETED)
            elif not self._draining:
                self._end(run, RunState.STOPPED)

    def _end(self, run: Run, state: RunState, error: str = "", told: str = "") -> None:
        """Tells the watchers, and writes the state; if that fails, it is kept and written later."""
        run_ended(state)
        self._unwritten[run.run_id] = run.record.now(state, error, told)
        self._unsynced[run.run_id] = run
        run.events.tell(StateEvent(state, error, told))
        self._write_down(run.run_id)

    def _write_down(self, run_id: str) -> None:
        folder = RunFolder(self._folder / run_id)
        if folder.exists:
            with contextlib.suppress(DomainError, OSError):
                if run_id in self._unsynced:
                    self._unsynced[run_id].events.sync()
                folder.write_record(self._unwritten[run_id])
                del self._unwritten[run_id]
                self._unsynced.pop(run_id, None)

    def _created(self, run_id: str) -> datetime:
        """Of a run that cannot be read, or that no clock can have been at, a time before all others."""
        with contextlib.suppress(Exception):  # the list of runs tells what is wrong, and needs this one's place
            if (created := self.record(run_id).created_at) < _NO_CLOCK:
                return created
        return datetime.fromtimestamp(0, UTC)

    def _now(self) -> datetime:
        """The time, but later than the start of every other run, even if the clock was set back."""
        others = [self._created(run_id) for run_id in self.run_ids()[:1]]
        return max([datetime.now(UTC), *(other + timedelta(microseconds=1) for other in others)])


def _own_record(folder: RunFolder) -> RunRecord:
    """Raises STATE_DAMAGED, also for the record of another run: of a folder that was copied. Two would write to one
    learner and one scope of the memory."""
    record = folder.record()
    if record.run_id != folder.path.name:
        path = folder.path / "run.json"
        raise state_damaged(
            path,
            f"{path} is of the run {record.run_id!r}, and its folder is called {folder.path.name!r}: a copied folder "
            "is no run of its own. Move it away, or call it as the run is called. Other runs are not affected.",
        )
    return record


def _size(run: Run) -> int:
    return min(1 + len(run.events.entries), _RECENT_EVENTS)


def _cause(run: Run, error: Exception) -> tuple[str, str]:
    """The error of the run, and what those who only look on are told of it; empty: the same."""
    # Whatever noticed it first, and however much of the folder is left, the text is the same.
    if not run.folder.exists or _is_missing_below(error, run.folder.path):
        return f"the folder of the run, or a file in it, was removed: {run.folder.path}", ""
    if isinstance(error, EnvironmentChanged):
        return f"{error}. {ADVICE}", ""
    return words_of(error), told_of(error)


def _is_missing_below(error: Exception, folder: Path) -> bool:
    """Whether the error says that the folder, or a file of it, is not there."""
    if isinstance(error, DomainError):
        return error.reason is Reason.FOLDER_REMOVED and Path(error.metadata["folder"]).is_relative_to(folder)
    return isinstance(error, FileNotFoundError) and Path(str(error.filename)).is_relative_to(folder)
