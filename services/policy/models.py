"""The models of one policy: the one that new calls and sessions go to, and those that it replaced.

A session is an episode: it finishes on the model that it began with, whatever is loaded meanwhile. A replaced model is
closed when no call is in flight and none of its sessions has asked for a while.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

import structlog

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import PolicyState, PublishedWeights
from mulligan.policy.config import ModelSettings, PolicySettings
from mulligan.policy.deployment import Deployment
from mulligan.policy.factory import OpenBackend
from mulligan.policy.loading import source_of
from mulligan.policy.uploads import Uploads
from mulligan.policy.versions import VersionStore

log = structlog.get_logger()
_MOST_SESSIONS = 65_536  # those that asked longest ago are forgotten, and begin anew when they ask again
_LOOK_SECONDS = 0.05
_ENGINE = "engine-"


class Model:
    """A deployment, and who uses it. `folder` is its backend's own."""

    def __init__(self, deployment: Deployment, folder: Path):
        self.deployment = deployment
        self.folder = folder
        self.calls = 0
        self.asked = float("-inf")  # when a session's last call ended, by `monotonic`
        self.closed = False


class _Folder:
    """Of one policy: its versions, and a folder for each of its engines. Methods wait for the disk."""

    def __init__(self, path: Path | None, keep_versions: int):
        self.store = VersionStore(path, keep_versions)
        self._temporary = None if path else tempfile.TemporaryDirectory(prefix="mulligan-engines-")
        self._path = path or Path(self._temporary.name)  # type: ignore[union-attr]
        for left_over in self._path.glob(f"{_ENGINE}*"):
            shutil.rmtree(left_over, ignore_errors=True)

    def for_engine(self) -> Path:
        return Path(tempfile.mkdtemp(prefix=_ENGINE, dir=self._path))

    def close(self) -> None:
        self.store.close()
        if self._temporary is not None:
            self._temporary.cleanup()


class Models:
    """Made by `open`. `load` comes before anything else."""

    def __init__(
        self, name: str, service: PolicySettings, folder: _Folder, create: OpenBackend, uploads: Uploads | None
    ):
        self.name = name
        self.draining: list[Model] = []
        self._changing = asyncio.Lock()  # weights and models are exchanged one at a time
        self._service = service
        self._create = create
        self._uploads = uploads
        self._folder = folder
        self._store = folder.store
        self._newest: Model | None = None
        self._sessions: OrderedDict[str, Model] = OrderedDict()
        self._drains: set[asyncio.Task[None]] = set()
        self._computed = 0.0  # seconds, in models that are closed

    @classmethod
    async def open(
        cls,
        name: str,
        service: PolicySettings,
        folder: Path | None,
        create: OpenBackend,
        uploads: Uploads | None = None,
    ) -> Models:
        """`folder` is the policy's own; None: nothing survives a restart. Raises OSError when it cannot be used."""
        return cls(name, service, await asyncio.to_thread(_Folder, folder, service.keep_versions), create, uploads)

    @property
    def newest(self) -> Model:
        assert self._newest is not None, "nothing was loaded yet"
        return self._newest

    @property
    def all(self) -> list[Model]:
        return [*self.draining, self._newest] if self._newest is not None else list(self.draining)

    @property
    def compute_seconds(self) -> float:
        return self._computed + sum(model.deployment.backend.compute_seconds for model in self.all)

    async def load(
        self, settings: ModelSettings, commit: Callable[[], None] = lambda: None, *, restore: bool = False
    ) -> None:
        """Opens a model and, once it serves, sends new calls and sessions to it. `commit` makes that last. With
        `restore` it serves the version that it served before a restart.

        Raises UnsupportedModel, DomainError or OSError; then all is as it was.
        """
        self._refuse_released()
        folder = await asyncio.to_thread(self._folder.for_engine)
        try:
            version = await asyncio.to_thread(self._first_version, settings, restore)
            backend = await self._create(settings, folder, version)
            deployment = Deployment(self.name, settings, self._service, backend, self._store, self._uploads)
            async with self._changing:
                await _or_close(self._start(deployment), backend.close)
                await _or_close(asyncio.to_thread(commit), deployment.close)
                self._exchange(Model(deployment, folder))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def serves(self, settings: ModelSettings) -> bool:
        """Whether these are the settings of the newest model, and it answers."""
        deployment = self.newest.deployment
        return deployment.settings == settings and deployment.state is not PolicyState.REFUSED

    async def update_weights(self, weights: PublishedWeights) -> float | None:
        async with self._changing:
            return await self.newest.deployment.update_weights(weights)

    async def rollback(self, policy_version: int) -> None:
        async with self._changing:
            await self.newest.deployment.rollback(policy_version)

    async def release_memory(self) -> None:
        async with self._changing:
            await self.newest.deployment.release_memory()

    async def resume_memory(self) -> None:
        async with self._changing:
            await self.newest.deployment.resume_memory()

    async def _start(self, deployment: Deployment) -> None:
        self._refuse_released()
        await deployment.start()

    def _refuse_released(self) -> None:
        """Calls that wait for the memory of the model would wait for ever."""
        if self._newest is not None and self._newest.deployment.state is PolicyState.RELEASED:
            message = f"the memory of {self.name} is released: ResumeMemory comes first"
            raise DomainError(Reason.ENGINE_UNAVAILABLE, message)

    def _first_version(self, settings: ModelSettings, restore: bool) -> int:
        return self._store.first_version(source_of(settings)) if restore else self._store.next_version

    def _exchange(self, model: Model) -> None:
        old = self._newest
        self._newest = model
        if old is not None:
            self.draining.append(old)
            task = asyncio.create_task(self._drain(old))
            self._drains.add(task)
            task.add_done_callback(self._drains.discard)

    @contextmanager
    def use(self, session_id: str = "") -> Iterator[Model]:
        """The model that answers a call of this session."""
        model = self._choose(session_id) if session_id else self.newest
        model.calls += 1
        try:
            yield model
        finally:
            model.calls -= 1
            if session_id:
                model.asked = monotonic()

    def _choose(self, session_id: str) -> Model:
        model = self._sessions.get(session_id)
        if model is None or model.closed:
            model = self._sessions[session_id] = self.newest
            if len(self._sessions) > _MOST_SESSIONS:
                self._sessions.popitem(last=False)
        self._sessions.move_to_end(session_id)
        return model

    async def _drain(self, model: Model) -> None:
        idle = self._service.session_idle_seconds
        while model.calls or monotonic() - model.asked < idle:  # noqa: ASYNC110 - time must pass as well
            await asyncio.sleep(_LOOK_SECONDS)
        try:
            await self._close(model)
        except Exception:
            log.exception("a replaced model did not close", policy=self.name)
        else:
            log.info("a replaced model is closed", policy=self.name, model=model.deployment.backend.model.model)

    async def finished(self) -> None:
        """Returns when no call is in flight."""
        while any(model.calls for model in self.all):  # noqa: ASYNC110 - once in a policy's life
            await asyncio.sleep(_LOOK_SECONDS)

    async def close(self) -> None:
        """Calls in flight fail."""
        for task in self._drains:
            task.cancel()
        await asyncio.gather(*self._drains, return_exceptions=True)
        results = await asyncio.gather(*(self._close(model) for model in self.all), return_exceptions=True)
        await asyncio.to_thread(self._folder.close)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _close(self, model: Model) -> None:
        model.closed = True  # whatever session asks now begins anew
        self._computed += model.deployment.backend.compute_seconds
        if model in self.draining:
            self.draining.remove(model)
        await model.deployment.close()
        await asyncio.to_thread(shutil.rmtree, model.folder, ignore_errors=True)


async def _or_close(work: Awaitable[object], close: Callable[[], Awaitable[object]]) -> None:
    try:
        await work
    except BaseException:
        await close()
        raise
