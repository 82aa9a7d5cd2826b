"""The runs of one trainer: starts, stops and resumes them, one at a time, and goes on with unfinished ones at start."""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
from pathlib import Path

import structlog

from services.common.errors import DomainError, Reason, invalid_field
from services.common.types import Split
from services.trainer.algorithm import evaluate
from services.trainer.episode import Player
from services.trainer.events import EvaluationEvent, StateEvent
from services.trainer.folder import RunFolder, RunRecord, RunState
from services.trainer.named import NamedPolicy, check_environment, check_top_k
from services.trainer.run import Run, Services, evaluation_of
from services.trainer.settings import EvaluationSettings, RolloutSettings, RunSettings
from services.trainer.trainable import prompt_notices

log = structlog.get_logger()
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class RunManager:
    """Owns `folder`: a second process on it is refused with OSError."""

    def __init__(self, folder: Path, services: Services):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._services = services
        self._runs: dict[str, Run] = {}
        self._active: asyncio.Task[None] | None = None
        self._active_id = ""
        self._publishing = ""
        self._draining = False
        self._lock = (folder / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"runs_folder: {folder} is in use by another trainer") from None

    def go_on(self) -> None:
        """Takes up the run that was running when the trainer ended."""
        for run_id in self.run_ids():
            if self.record(run_id).state is RunState.RUNNING and self._active is None:
                log.info("going on with a run", run_id=run_id)
                self._drive(self._open(run_id))

    def run_ids(self) -> list[str]:
        """Newest first."""
        found = [path.parent.name for path in self._folder.glob("*/run.json")]
        return sorted(found, key=lambda run_id: (self.record(run_id).created_at, run_id), reverse=True)

    def record(self, run_id: str) -> RunRecord:
        return self._run_folder(run_id).record()

    def run(self, run_id: str) -> Run:
        """Raises UNKNOWN_RUN."""
        self._run_folder(run_id)
        return self._runs.get(run_id) or self._open(run_id)

    def start(self, run_id: str, settings: RunSettings) -> Run:
        if not _RUN_ID.fullmatch(run_id):
            raise invalid_field("run_id", "1 to 64 letters, digits, '.', '_' and '-', the first a letter or digit")
        folder = RunFolder(self._folder / run_id)
        if (folder.path / "run.json").exists():
            if folder.settings() != settings:
                raise DomainError(Reason.RUN_CONFLICT, f"run {run_id} exists with other settings")
            return self.run(run_id)
        self._refuse_a_second()
        folder.create(run_id, settings)
        run = self._open(run_id)
        self._drive(run)
        return run

    def stop(self, run_id: str) -> Run:
        run = self.run(run_id)
        if self._is_active(run_id):
            run.stop()
        return run

    def resume(self, run_id: str) -> Run:
        record = self.record(run_id)
        if self._is_active(run_id):
            return self.run(run_id)
        if record.state is RunState.COMPLETED:
            raise DomainError(Reason.RUN_COMPLETED, f"run {run_id} is complete")
        self._refuse_a_second()
        run = self._open(run_id)
        self._drive(run)
        return run

    def notice(self, text: str) -> None:
        """Tells the watchers of the run that is trained."""
        if self._active is not None and not self._active.done():
            self._runs[self._active_id].notice(text)

    async def drain(self, seconds: float) -> None:
        """Ends after the step that runs, or within it after `seconds`; the run stays marked as running, so that
        the next start goes on with it. The run still gives its learner back, so this server must still serve."""
        self._draining = True
        if self._active is not None and not self._active.done():
            self._runs[self._active_id].stop()
            await asyncio.wait([self._active], timeout=seconds)
            await self._cancel()

    async def close(self) -> None:
        await self._cancel()
        self._lock.close()

    async def _cancel(self) -> None:
        if self._active is not None:
            self._active.cancel()
            await asyncio.gather(self._active, return_exceptions=True)

    async def publish(self, run_id: str) -> None:
        """Makes the run's actor serve its last checkpoint. Raises CHECKPOINT_NOT_FOUND, LEARNER_OWNED, and what keeps a
        run from starting."""
        run = self.run(run_id)
        checkpoint = run.folder.checkpoint()
        if checkpoint is None:
            raise DomainError(Reason.CHECKPOINT_NOT_FOUND, f"run {run_id} has no checkpoint yet")
        self._refuse_a_second()
        self._publishing = run_id
        try:
            learner = await self._services.open_learner(run_id, run.settings)
            try:
                await learner.load_checkpoint(checkpoint.name)
                await (await self._services.actor(run.settings, learner, run.notice)).publish()
            finally:
                await learner.close()
        finally:
            self._publishing = ""

    async def evaluate(
        self,
        environment: str,
        settings: EvaluationSettings,
        rollout: RolloutSettings,
        seed: int,
        threshold: float,
        policy: str = "",
    ) -> tuple[EvaluationEvent, int]:
        """First attempts of a policy as it serves now, and its version. Raises UNKNOWN_POLICY, INVALID_SETTING."""
        services = self._services
        info = await services.environment.describe(environment)
        named = await NamedPolicy.open(services.policy, policy)
        check_environment(info, named.info)
        check_top_k(named.info, settings.top_k, "top_k")
        tasks = await services.environment.list_tasks(environment, Split.TEST, settings.tasks)
        name = f"evaluation-{os.urandom(4).hex()}"
        player = Player(services.environment, named, info, named.info, "0", rollout.max_restarts)
        attempts = await evaluate(player, name, [task.task_id for task in tasks], settings, rollout, seed)
        for text in prompt_notices(attempts):
            log.warning(text, environment=environment, policy=named.info.name)
        return evaluation_of(0, attempts, threshold), named.info.policy_version

    def _run_folder(self, run_id: str) -> RunFolder:
        folder = RunFolder(self._folder / run_id)
        if not _RUN_ID.fullmatch(run_id) or not (folder.path / "run.json").exists():
            raise DomainError(Reason.UNKNOWN_RUN, f"there is no run {run_id!r}", run_id=run_id)
        return folder

    def _open(self, run_id: str) -> Run:
        known = self._runs.get(run_id)
        events = known.events if known else None
        self._runs[run_id] = Run(run_id, RunFolder(self._folder / run_id), self._services, events)
        return self._runs[run_id]

    def _is_active(self, run_id: str) -> bool:
        return self._active is not None and not self._active.done() and self._active_id == run_id

    def _refuse_a_second(self) -> None:
        busy = self._active_id if self._active is not None and not self._active.done() else self._publishing
        if busy:
            message = f"this trainer trains run {busy}; stop it first, or start another trainer"
            raise DomainError(Reason.LEARNER_OWNED, message, run_id=busy)

    def _drive(self, run: Run) -> None:
        self._active_id = run.run_id
        self._set_state(run, RunState.RUNNING)
        self._active = asyncio.create_task(self._train(run), name=f"run {run.run_id}")

    async def _train(self, run: Run) -> None:
        try:
            await run.train()
        except asyncio.CancelledError:
            raise
        except Exception as error:  # whatever ends a run is its state, and the trainer serves on
            log.error("run failed", run_id=run.run_id, exc_info=error)
            self._set_state(run, RunState.FAILED, f"{type(error).__name__}: {error}")
        else:
            if not run.stopped:
                self._set_state(run, RunState.COMPLETED)
            elif not self._draining:
                self._set_state(run, RunState.STOPPED)

    def _set_state(self, run: Run, state: RunState, error: str = "") -> None:
        record = run.folder.record()
        run.folder.write_record(RunRecord(record.run_id, state, record.created_at, record.settings, error))
        run.events.add(StateEvent(state, error))
