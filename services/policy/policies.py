"""The policies of a service by name, and the models that are loaded into them while it runs.

It is the `PolicyPort` of a trainer in the same process; `servicer.py` puts it on the wire.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from typing import IO, Any, TypeVar

import structlog
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from mulligan.common.disk import writing_to
from mulligan.common.errors import DomainError, Reason
from mulligan.common.file_lock import lock_file
from mulligan.common.files import make_folder
from mulligan.common.inference import (
    CallOptions,
    Completion,
    Feature,
    PolicyInfo,
    PolicyVersion,
    Prompt,
    PublishedWeights,
    SamplingParams,
)
from mulligan.common.model_files import UnsupportedModel
from mulligan.common.suggest import did_you_mean
from mulligan.common.tasks import Broadcast, cancel
from mulligan.policy import metrics
from mulligan.policy.config import POLICY_NAME, PolicySettings
from mulligan.policy.deployment import Deployment
from mulligan.policy.factory import OpenBackend, create_backend
from mulligan.policy.gauges import gauges
from mulligan.policy.model_request import (
    ModelRequest,
    check_addresses,
    check_folders,
    model_settings,
    settings_digest,
    shared_servers,
)
from mulligan.policy.model_settings import ModelSettings
from mulligan.policy.policy import Policy
from mulligan.policy.preflight import check_release
from mulligan.policy.uploads import Uploads

log = structlog.get_logger()
T = TypeVar("T")
_NAME = re.compile(POLICY_NAME)
_PLAIN = CallOptions()
_MOST_CHANGES = 1024  # also of callers that have left
_RETRY_AFTER = timedelta(seconds=1)


class Policies(Collector):
    """Made by `open`. An empty name is the default policy's. Calls raise DomainError as those of the contract do.

    `get` finds the policy of a call, which answers it. Changes go through here: `_shielded` runs each in a task of its
    own, so that a caller who leaves does not stop it, and `close` can. `_change` gives a change of weights to its
    policy, which has the lock. LoadModel and UnloadModel wait until the policy is neither opening nor closing
    (`_settled`), and then make it so: `policy.py` has the table of its states.
    """

    def __init__(self, settings: PolicySettings, create: OpenBackend):
        self.settings = settings
        self._create = create
        self._own: dict[str, ModelSettings] = {settings.default_policy: model_settings(settings), **settings.policies}
        self._policies: dict[str, Policy] = {}
        self._damaged: dict[str, DomainError] = {}  # those that cannot be served again, and why
        self._settles = Broadcast()  # woken when a policy is not opening or closing any more
        self._tasks: set[asyncio.Task[Any]] = set()
        self._lock = _lock(settings.state_folder) if settings.state_folder else None
        uploads = settings.state_folder / "uploads" if settings.state_folder else None
        self.uploads = Uploads(
            uploads,
            int(settings.upload_gib * 2**30),
            spare_bytes=int(settings.upload_spare_gib * 2**30),
            stall_seconds=settings.upload_stall_seconds,
        )

    @classmethod
    async def open(cls, settings: PolicySettings, create: OpenBackend = create_backend) -> Policies:
        """Serves the policies of the settings, and those that LoadModel brought before a restart. The log tells of a
        further policy whose state is damaged, whose loaded model cannot be opened again, or that is a guest on servers
        which hold other weights, and the others serve: its calls are STATE_DAMAGED until a model is loaded into it, or
        it is unloaded.

        Raises an ExceptionGroup of UnsupportedModel, one for each other policy that cannot be served, and OSError when
        the state folder cannot be used.
        """
        policies = cls(settings, create)
        try:
            await policies._restore_all()
        except BaseException:
            await policies.close()
            raise
        return policies

    @property
    def deployments(self) -> Iterator[Deployment]:
        """The newest of each policy."""
        return (policy.newest for policy in list(self._policies.values()) if policy.serving)

    def collect(self) -> Iterator[Metric]:
        """As Prometheus asks for it."""
        return gauges(self.deployments)

    def get(self, name: str = "") -> Policy:
        """Raises DomainError UNKNOWN_POLICY and STATE_DAMAGED."""
        if (damaged := self._damaged.get(name)) is not None:
            raise damaged.told(damaged.message)
        found = self._policies.get(name or self.settings.default_policy)
        if found is None or not found.serving:
            serving = [policy.name for policy in self._policies.values() if policy.serving]
            known = ", ".join(sorted(serving))
            near = did_you_mean(name, serving)
            raise DomainError(Reason.UNKNOWN_POLICY, f"no policy {name!r}{near}; there are {known}", policy=name)
        return found

    @property
    def damaged(self) -> tuple[str, ...]:
        """The policies whose calls are STATE_DAMAGED."""
        return tuple(self._damaged)

    async def info(self, policy: str = "") -> PolicyInfo:
        return self.get(policy).info

    async def policies(self) -> tuple[PolicyInfo, ...]:
        """All, by name."""
        return tuple(policy.info for _, policy in sorted(self._policies.items()) if policy.serving)

    async def generate(self, prompt: Prompt, sampling: SamplingParams, options: CallOptions = _PLAIN) -> Completion:
        return await self.get(options.policy).generate(prompt, sampling, options)

    async def tokenize(self, prompt: Prompt | str, options: CallOptions = _PLAIN) -> tuple[int, ...]:
        return await self.get(options.policy).tokenize(prompt, options)

    async def versions(
        self, policy: str = "", below: int | None = None, limit: int = 1000
    ) -> tuple[PolicyVersion, ...]:
        """Newest first, those less than `below`."""
        return await self.get(policy).versions(below, limit)

    async def update_weights(self, weights: PublishedWeights, policy: str = "") -> float | None:
        """The largest difference that the canary found; None without one."""
        return await self._change(policy, lambda deployment: deployment.update_weights(weights))

    async def rollback(self, policy_version: int, policy: str = "") -> None:
        await self._change(policy, lambda deployment: deployment.rollback(policy_version))

    async def release_memory(self, policy: str = "") -> None:
        """Raises DomainError UNSUPPORTED_OPTION, too, while another policy is a guest on the servers."""

        async def release(deployment: Deployment) -> None:
            check_release(deployment.backend.model)
            for guest in self._policies.values():
                if any(one.own.is_guest and shared_servers(deployment.settings, one) for one in guest.settings):
                    message = f"policy: {guest.name} is a guest on its servers (adapters_only): unload it first"
                    feature = Feature.MEMORY_RELEASE
                    raise DomainError(Reason.UNSUPPORTED_OPTION, message, field="policy", feature=feature)
            await deployment.release_memory()

        await self._change(policy, release)

    async def resume_memory(self, policy: str = "") -> None:
        await self._change(policy, Deployment.resume_memory)

    async def load_model(
        self, policy: str, model: str, backend: str = "", options: Mapping[str, str] | None = None
    ) -> PolicyInfo:
        """`options` are settings by dotted name, values as JSON."""
        own = settings_digest(self._own.get(policy))
        request = ModelRequest(model=model, backend=backend, options=dict(options or {}), own=own)
        return await self._shielded(self._load(policy, request))

    async def unload_model(self, policy: str) -> None:
        if policy == self.settings.default_policy:
            raise DomainError(Reason.DEFAULT_POLICY, f"{policy} is the default policy, which stays")
        if policy in self._damaged:
            await asyncio.to_thread(self._forget, policy)
            self._damaged.pop(policy, None)
            return
        self.get(policy)
        await self._shielded(self._unload(policy))

    async def close(self) -> None:
        """Calls in flight fail."""
        policies = list(self._policies.values())  # also those of which a task that is cancelled closes the models
        await cancel(*self._tasks)
        self._policies.clear()
        results = await asyncio.gather(*(policy.close() for policy in policies), return_exceptions=True)
        self.uploads.close()
        if self._lock is not None:
            self._lock.close()
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _load(self, name: str, request: ModelRequest) -> PolicyInfo:
        settings = request.settings(self._own.get(name))
        check_addresses(request, self._own.get(name), self.settings.allowed_addresses)
        await asyncio.to_thread(check_folders, settings, self.settings.models_folder)
        policy = await self._settled(name)
        if policy is not None and policy.serves(settings):
            return policy.info
        with writing_to(self.settings.state_folder or Path(gettempdir())):
            try:
                return (await self._open_model(name, settings, partial(self._remember, name, request))).info
            except UnsupportedModel as error:
                message = f"{settings.model_name} ({settings.backend}): {error}"
                raise DomainError(Reason.UNSUPPORTED_MODEL, message) from error

    async def _unload(self, name: str) -> None:
        policy = await self._settled(name) or self.get(name)
        policy.closing = True
        try:
            await asyncio.to_thread(self._forget, name)
        except OSError:
            policy.closing = False
            self._settles.wake_all()
            raise
        await policy.finished()
        await self._remove(policy)
        log.info("policy unloaded", policy=name)

    async def _settled(self, name: str) -> Policy | None:
        """The policy of this name, if there is one, as soon as it is neither opening nor closing. The caller changes
        that before it waits for anything else."""
        while (policy := self._policies.get(name)) is not None and (policy.opening is not None or policy.closing):
            await self._settles.wait()
        return policy

    async def _open_model(
        self, name: str, settings: ModelSettings, commit: Callable[[], None] = lambda: None, *, restore: bool = False
    ) -> Policy:
        """As `Policy.load`, of a new policy if there is none of this name; it is removed if that fails."""
        self._refuse_shared_servers(name, settings)
        if not restore:
            self._refuse_too_many()
        policy = self._policies.get(name)  # nothing is awaited from here on until it is told of the model
        if policy is None:
            policy = Policy(name, self.settings, self._folder(name), self._create, self.uploads)
            self._policies[name] = policy
        try:
            await policy.load(settings, commit, restore=restore)
        finally:
            if not policy.deployments:
                await self._remove(policy)
            self._settles.wake_all()
        self._damaged.pop(name, None)
        return policy

    async def _remove(self, policy: Policy) -> None:
        try:
            await policy.close()
        finally:
            self._policies.pop(policy.name, None)
            metrics.forget(policy.name)
            self._settles.wake_all()

    async def _restore_all(self) -> None:
        stored = self._stored()
        # Guests come after the policies of their servers.
        guests = sorted([name for name in {*self._own, *stored} if await asyncio.to_thread(self._is_guest, name)])
        owners = sorted({*self._own, *stored}.difference(guests))
        names = [*owners, *guests]
        results = await asyncio.gather(*map(self._restore, owners), return_exceptions=True)
        results += await asyncio.gather(*map(self._restore, guests), return_exceptions=True)
        problems = []
        for name, result in zip(names, results, strict=True):
            if result is None:
                continue
            is_damaged = isinstance(result, DomainError) and result.reason is Reason.STATE_DAMAGED
            is_damage = name in stored or name in guests or is_damaged
            if is_damage and name != self.settings.default_policy and isinstance(result, Exception):
                self._damaged[name] = self._told_damage(name, result)
            elif isinstance(result, UnsupportedModel | DomainError | OSError):
                problems.append(f"{name}: {result}")
            else:
                raise result
        if problems:
            raise ExceptionGroup("; ".join(problems), [*map(UnsupportedModel, problems)])

    def _is_guest(self, name: str) -> bool:
        """Of a policy that is to be restored. False where it cannot be read: what restores it says why."""
        own = self._own.get(name)
        try:
            request = self._remembered(name)
            settings = request.settings(own) if request is not None else own
        except (OSError, DomainError):
            return False
        return settings is not None and settings.own.is_guest

    def _told_damage(self, name: str, error: Exception) -> DomainError:
        said = error.message if isinstance(error, DomainError) else str(error)
        file = error.metadata.get("file") if isinstance(error, DomainError) else None
        log.error("a policy is not served: its state cannot be used", policy=name, error=said)
        message = (
            f"the policy {name} is not served since the service started: {said.rstrip('.')}. Other policies are not "
            "affected; this one serves again when a model is loaded into it, and is forgotten when it is unloaded"
        )
        return DomainError(Reason.STATE_DAMAGED, message, file=file or self._request_file(name))

    async def _restore(self, name: str) -> None:
        own = self._own.get(name)
        path = self._request_file(name)
        request = await asyncio.to_thread(self._remembered, name)
        if request is None and own is None:
            return
        settings = request.settings(own) if request is not None else model_settings(own or self.settings)
        try:
            if request is not None:
                check_addresses(request, own, self.settings.allowed_addresses)
                await asyncio.to_thread(check_folders, settings, self.settings.models_folder)
            await self._open_model(name, settings, restore=True)
        except (UnsupportedModel, DomainError) as error:
            if request is None or (isinstance(error, DomainError) and error.reason is Reason.STATE_DAMAGED):
                raise
            raise UnsupportedModel(f"{error} (it was loaded by LoadModel: {path})") from error

    def _refuse_too_many(self) -> None:
        """Raises DomainError CAPACITY_REACHED."""
        count = sum(len(policy.settings) for policy in self._policies.values())
        most = self.settings.max_models
        if count >= most:
            draining = sum(len(policy.deployments) - 1 for policy in self._policies.values() if policy.serving)
            message = (
                f"this server has {count} of at most {most} models (max_models), {draining} of them replaced ones with "
                "sessions that are not over. To free one: mulligan policy unload NAME"
            )
            raise DomainError(Reason.CAPACITY_REACHED, message)

    def _refuse_shared_servers(self, name: str, settings: ModelSettings) -> None:
        """A server has one policy that sets its weights, and one guest at most. Raises DomainError INVALID_SETTING, or
        ENGINE_UNAVAILABLE for a guest of a policy whose memory is released."""
        for policy in self._policies.values():
            for taken in policy.settings:
                for address, field in shared_servers(settings, taken).items():
                    if settings.own.is_guest == taken.own.is_guest or policy.name == name:
                        limit = "a server has one guest (adapters_only)"
                        if not taken.own.is_guest:
                            limit = "a server holds one model's weights; as a guest (adapters_only) another policy may "
                            limit += "have adapters there"
                        message = f"{field}: {address} serves the policy {policy.name}, and {limit}"
                        raise DomainError(Reason.INVALID_SETTING, message, field=field)
            if settings.own.is_guest and policy.serving and shared_servers(settings, policy.newest.settings):
                policy.newest.refuse_released()

    def _folder(self, name: str) -> Path | None:
        return self.settings.state_folder / "policies" / name if self.settings.state_folder else None

    def _request_file(self, name: str) -> Path | None:
        folder = self._folder(name)
        return folder / "model.json" if folder else None

    def _stored(self) -> list[str]:
        """Policies into which a model was loaded."""
        if self.settings.state_folder is None:
            return []
        found = []
        for path in sorted((self.settings.state_folder / "policies").glob("*/model.json")):
            if _NAME.fullmatch(path.parent.name):
                found.append(path.parent.name)
            else:
                log.warning("a folder is no policy, because no policy can have its name", folder=str(path.parent))
        return found

    def _remembered(self, name: str) -> ModelRequest | None:
        """What LoadModel brought, unless the policy's own settings have changed since."""
        path = self._request_file(name)
        kept = ModelRequest.read(path) if path is not None else None
        if kept is None:
            return None
        request = kept.over(self._own.get(name))
        if request is None:
            log.warning("the settings of a policy changed: they replace what was loaded", policy=name)
            self._forget(name)
        elif request != kept:
            self._remember(name, request)
        return request

    def _remember(self, name: str, request: ModelRequest) -> None:
        if (path := self._request_file(name)) is not None:
            request.write(path)

    def _forget(self, name: str) -> None:
        if (path := self._request_file(name)) is not None:
            path.unlink(missing_ok=True)

    async def _change(self, policy: str, change: Callable[[Deployment], Awaitable[T]]) -> T:
        return await self._shielded(self.get(policy).change(change))

    async def _shielded(self, work: Coroutine[Any, Any, T]) -> T:
        if len(self._tasks) >= _MOST_CHANGES:
            work.close()
            message = f"{len(self._tasks)} changes of policies run or wait already"
            raise DomainError(Reason.QUEUE_FULL, message, retry_after=_RETRY_AFTER)
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # its caller may be gone: then nobody else would look


def _lock(folder: Path) -> IO[bytes]:
    """Keeps other services out of a state folder, whatever their policies are called. Raises OSError."""
    try:
        make_folder(folder)
        return lock_file(folder / "lock")
    except BlockingIOError:
        message = f"{folder} is in use by another policy service: give each service a folder of its own"
        raise OSError(f"state_folder: {message}") from None
    except OSError as error:
        raise OSError(f"state_folder: cannot use {folder}: {error}") from error
