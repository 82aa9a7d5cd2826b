"""One model of a policy: its engines, its versions, and the gate that calls pass.

Weights serve only after they were checked on every engine. When they fail, calls wait while the version before them is
loaded and checked in turn; when that fails, too, calls are refused until an update or a rollback succeeds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from typing import Any, TypeVar

import structlog

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import Feature, PolicyState, PolicyVersion, PublishedWeights, VersionSpan, VersionState
from mulligan.policy import metrics
from mulligan.policy.backend import Backend, WeightsFile
from mulligan.policy.canary import check_probes
from mulligan.policy.config import ModelSettings, PolicySettings
from mulligan.policy.gate import Gate
from mulligan.policy.loading import FEATURES, Loader
from mulligan.policy.uploads import Uploads, find_weights
from mulligan.policy.versions import Record, VersionStore

log = structlog.get_logger()
R = TypeVar("R")


class Deployment:
    """Call `start` once before anything else. `store` is shared by the models of one policy, the one that serves and
    those that it replaced; their owner closes it after them."""

    def __init__(
        self,
        name: str,
        settings: ModelSettings,
        service: PolicySettings,
        backend: Backend,
        store: VersionStore,
        uploads: Uploads | None = None,
    ):
        self.name = name
        self.settings = settings
        self.backend = backend
        self._store = store
        self._uploads = uploads
        self._weights_folder = service.weights_folder
        self._gate = Gate(name, backend.policy_version, self._available)
        self._loader = Loader(name, settings, backend, store, self._gate, service.canary_tolerance)
        self._updating = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._tokens = metrics.SAMPLED_TOKENS.labels(name)

    @property
    def policy_version(self) -> int:
        return self._gate.policy_version

    @property
    def state(self) -> PolicyState:
        return self._gate.state

    @property
    def problem(self) -> str:
        """What keeps it from serving, or what went wrong with the last update."""
        if self._gate.problem or self._gate.state is not PolicyState.UNAVAILABLE:
            return self._gate.problem
        return "; ".join(sorted({replica.info.problem for replica in self.backend.replicas} - {""}))

    @property
    def in_flight(self) -> int:
        return self._gate.in_flight

    @property
    def healthy(self) -> bool:
        """Whether calls are answered, if only after an update."""
        return self.state not in (PolicyState.REFUSED, PolicyState.UNAVAILABLE)

    @property
    def canary_tolerance(self) -> float:
        """The largest difference in log-probability that passes."""
        return self._loader.tolerance

    @property
    def canary_difference(self) -> float | None:
        """Of the last version that was to serve, whether it passed or not; None where nothing was compared."""
        return self._loader.canary_difference

    async def start(self) -> None:
        """Serves the version that served before a restart, or else the weights that the model came with.

        Raises DomainError when the engines take none of them.
        """
        await self._loader.start()
        log.info("model loaded", **self._facts())

    def serving(
        self, min_policy_version: int | None = None, version_wait: float = 0.0
    ) -> AbstractAsyncContextManager[None]:
        """As `Gate.serving`: `async with deployment.serving(…):` around one call."""
        return self._gate.serving(min_policy_version, version_wait)

    async def verified(self, spans: Sequence[VersionSpan]) -> bool:
        """As `Gate.verified`. To be asked once of all that is answered: what passes is counted as sampled."""
        passed = await self._gate.verified(spans)
        if passed:
            self._tokens.inc(sum(span.token_count for span in spans))
        return passed

    async def update_weights(self, weights: PublishedWeights) -> float | None:
        """Loads, checks and serves these weights; returns the greatest difference that the canary found.

        Raises DomainError as PolicyAdminService.UpdateWeights does. Cancelling the caller does not stop it.
        """
        return await self._shielded(self._update(weights))

    async def rollback(self, policy_version: int) -> None:
        """Raises DomainError as PolicyAdminService.Rollback does. Cancelling the caller does not stop it."""
        await self._shielded(self._rollback(policy_version))

    async def versions(self, below: int | None = None, limit: int = 1000) -> tuple[PolicyVersion, ...]:
        """Of all models of the policy, newest first, those less than `below`."""
        return await asyncio.to_thread(self._store.versions, below, limit)

    async def release_memory(self) -> None:
        """Raises DomainError as PolicyAdminService.ReleaseMemory does. Cancelling the caller does not stop it."""
        await self._shielded(self._release())

    async def resume_memory(self) -> None:
        """Raises DomainError as PolicyAdminService.ResumeMemory does. Cancelling the caller does not stop it."""
        await self._shielded(self._resume())

    async def close(self) -> None:
        """Calls in flight fail."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.backend.close()
        await asyncio.to_thread(self._store.end, self._loader.record.origin)

    def _available(self) -> bool:
        replicas = self.backend.replicas
        return not replicas or any(replica.info.serving for replica in replicas)

    async def _shielded(self, work: Coroutine[Any, Any, R]) -> R:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return await asyncio.shield(task)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # its caller may be gone: then nobody else would look

    async def _update(self, weights: PublishedWeights) -> float | None:
        started = time.monotonic()
        async with self._updating:
            current = self._is_current(weights)
            if current and self._gate.phase is PolicyState.SERVING:
                return self._loader.record.version.canary_difference
            known = await asyncio.to_thread(self._store.get, weights.policy_version)
            following = await asyncio.to_thread(lambda: self._store.next_version)
            self._refuse_update(weights, known, following)
            if current:  # the engines could not be brought back to it: another try
                file = await asyncio.to_thread(self._store.file, self._loader.record)
                await self._loader.exchange(self._loader.record, file, self._store.serve)
            else:
                await self._load_new(weights)
            if self._uploads is not None:
                await asyncio.to_thread(self._uploads.remove, weights.uri)
        seconds = time.monotonic() - started
        metrics.UPDATE_SECONDS.labels(self.name).observe(seconds)
        log.info("weights updated", seconds=round(seconds, 3), **self._facts())
        return self._loader.record.version.canary_difference

    async def _load_new(self, weights: PublishedWeights) -> None:
        number = weights.policy_version
        path = await asyncio.to_thread(find_weights, weights.uri, self._weights_folder, self._uploads)
        plain = WeightsFile(path, weights.kind, number, weights.sha256, weights.canary)
        version = PolicyVersion(
            policy_version=number,
            kind=weights.kind,
            state=VersionState.SERVING,
            sha256=weights.sha256,
            fingerprint=weights.fingerprint,
            created_at=datetime.now(UTC),
            model=self.backend.model.model,
        )
        present = self._loader.record
        record = Record(version, present.origin, present.source, present.setup, weights.canary)
        try:
            file = await asyncio.to_thread(self._store.stage, plain)
            await self._loader.exchange(record, file, self._store.serve, refuse=True)
        finally:
            if self._loader.record.number != number:
                await asyncio.to_thread(self._store.discard, number)

    def _is_current(self, weights: PublishedWeights) -> bool:
        version = self._loader.record.version
        return (version.policy_version, version.sha256) == (weights.policy_version, weights.sha256)

    def _refuse_update(self, weights: PublishedWeights, known: Record | None, following: int) -> None:
        self._refuse_change()
        model = self.backend.model
        feature = FEATURES[weights.kind]
        if feature not in model.features:
            message = f"kind: the engine of {model.model} takes no {weights.kind} weights"
            raise DomainError(Reason.UNSUPPORTED_OPTION, message, field="kind", feature=feature)
        number = weights.policy_version
        serving = self._gate.policy_version
        conflict = ""
        if known is not None and known.version.sha256 != weights.sha256:
            conflict = f"version {number} is known with other weights"
        elif known is not None and known.version.state in (VersionState.REFUSED, VersionState.WITHDRAWN):
            conflict = f"version {number} was {known.version.state}: {known.version.problem}"
        elif number <= serving and not self._is_current(weights):
            conflict = f"{number} is not greater"
        if conflict:
            message = f"version {serving} serves: {conflict}"
            raise DomainError(Reason.VERSION_CONFLICT, message, policy_version=serving, next_version=following)
        if weights.fingerprint != model.fingerprint:
            raise DomainError(
                Reason.MODEL_MISMATCH,
                f"the weights are of a model {weights.fingerprint}; this one, {model.model}, is {model.fingerprint}",
            )
        check_probes(weights.canary, model)

    def _refuse_change(self) -> None:
        if self.settings.frozen:
            raise DomainError(Reason.POLICY_FROZEN, f"the weights of {self.name} are frozen by its settings")
        if self._gate.phase is PolicyState.RELEASED:
            message = f"the memory of {self.name} is released: ResumeMemory comes first"
            raise DomainError(Reason.ENGINE_UNAVAILABLE, message)

    async def _rollback(self, number: int) -> None:
        async with self._updating:
            self._refuse_change()
            present = self._loader.record
            record = await asyncio.to_thread(self._store.get, number)
            kept = record is not None and record.version.state in (VersionState.KEPT, VersionState.SERVING)
            if record is None or not kept or record.origin != present.origin:
                raise DomainError(Reason.VERSION_NOT_KEPT, f"version {number} of {self.name} is not kept")
            if number == present.number and self._gate.phase is PolicyState.SERVING:
                return
            try:
                file = await asyncio.to_thread(self._store.file, record)
            except DomainError as error:
                message = f"version {number} of {self.name} is damaged: {error.message}"
                log.error("a kept version is damaged", policy=self.name, policy_version=number, problem=error.message)
                raise DomainError(Reason.VERSION_NOT_KEPT, message) from error
            reason = f"rolled back to version {number}"
            await self._loader.exchange(record, file, lambda found: self._store.serve(found, withdrawn=reason))
        log.warning("rolled back", before=present.number, **self._facts())

    async def _release(self) -> None:
        self._refuse_without_release()
        async with self._updating:
            if self._gate.phase is PolicyState.RELEASED:
                return
            phase = self._gate.phase
            problem = self._gate.problem
            self._gate.set(PolicyState.RELEASED)
            try:
                await self._gate.drained()
                await self.backend.release_memory()
            except BaseException:
                self._gate.set(phase, problem)
                raise
        log.info("memory released", **self._facts())

    async def _resume(self) -> None:
        self._refuse_without_release()
        async with self._updating:
            if self._gate.phase is not PolicyState.RELEASED:
                return
            await self.backend.resume_memory()
            await self._loader.resume()
            self._gate.refuse_refused()
        log.info("memory resumed", **self._facts())

    def _refuse_without_release(self) -> None:
        if Feature.MEMORY_RELEASE not in self.backend.model.features:
            message = f"the engine of {self.backend.model.model} cannot release its memory"
            raise DomainError(Reason.UNSUPPORTED_OPTION, message, field="policy", feature=Feature.MEMORY_RELEASE)

    def _facts(self) -> dict[str, object]:
        version = self._loader.record.version
        facts = {
            "policy": self.name,
            "model": version.model,
            "policy_version": version.policy_version,
            "kind": version.kind,
            "sha256": version.sha256,
            "canary_difference": version.canary_difference,
            "engine_checksum": version.engine_checksum,
        }
        return {key: value for key, value in facts.items() if value not in (None, "")}
