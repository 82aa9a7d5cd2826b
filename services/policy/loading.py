"""How a model's engines come from one version to another, and back when the other one fails its check."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime

import structlog

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import Feature, PolicyState, PolicyVersion, VersionState, WeightsKind
from mulligan.policy import metrics
from mulligan.policy.backend import Backend, Replica, WeightsFile
from mulligan.policy.canary import Trial, tolerance_of
from mulligan.policy.config import ModelSettings
from mulligan.policy.gate import Gate
from mulligan.policy.versions import Record, VersionStore

log = structlog.get_logger()
FEATURES = {WeightsKind.FULL: Feature.FULL_WEIGHTS, WeightsKind.LORA: Feature.LORA_WEIGHTS}
# After these the backend serves what it served before.
_UNTOUCHED = (Reason.MODEL_MISMATCH, Reason.WEIGHTS_NOT_FOUND, Reason.ENGINE_UNAVAILABLE, Reason.DISK_FULL)
_DAMAGED = (Reason.WEIGHTS_NOT_FOUND, Reason.CHECKSUM_MISMATCH)
_RESTORE_DELAYS = (0.2, 1.0, 5.0)  # seconds, while engines are unavailable


def source_of(settings: ModelSettings) -> str:
    """What a model is known by across restarts: the same name under the same backend."""
    return f"{settings.backend}:{settings.model}"


class Loader:
    """`record` is of the version that serves, or would if its engines were right. Its calls exclude each other: the
    caller sees to that."""

    def __init__(
        self,
        name: str,
        settings: ModelSettings,
        backend: Backend,
        store: VersionStore,
        gate: Gate,
        canary_tolerance: float,
    ):
        self._name = name
        self._settings = settings
        self._backend = backend
        self._store = store
        self._gate = gate
        self.tolerance = tolerance_of(canary_tolerance, backend.model.dtype)
        self._trials: dict[int, Trial] = {}  # of the version that serves, and of the one that is being loaded
        self.record: Record
        self.canary_difference: float | None = None  # of the last version that was to serve, passed or not

    @property
    def takes_weights(self) -> bool:
        return not self._backend.model.features.isdisjoint(FEATURES.values())

    async def start(self) -> None:
        """Serves the version that served before a restart, or else the weights that the model came with."""
        first = self._backend.policy_version
        served = await asyncio.to_thread(lambda: self._store.serving)
        known = await asyncio.to_thread(self._store.get, first)
        if known is None:
            await self._begin(first)
        elif served is None or served.origin != first or not await self._is_same_model(served):
            following = await asyncio.to_thread(lambda: self._store.next_version)  # never two meanings of one version
            log.warning("another model than before", policy=self._name, policy_version=following)
            await self._begin(following)
        else:
            await self._recover(served)

    async def exchange(
        self, record: Record, file: WeightsFile, commit: Callable[[Record], None], *, refuse: bool = False
    ) -> None:
        """Serves these weights, or what served before; raises what went wrong, after it was mended.

        `commit` makes it last; with `refuse` a version that fails its check is never loaded again.
        """
        before = self.record
        phase = self._gate.phase
        problem = self._gate.problem
        try:
            found = await self._load(record, file)
            await asyncio.to_thread(commit, found)
        except DomainError as error:
            self.canary_difference = self._trials[record.number].difference
            if error.reason in _UNTOUCHED and self._backend.policy_version == before.number:
                self._gate.set(phase, problem)
                self._trials.pop(record.number, None)
                raise
            if error.reason is Reason.CANARY_FAILED:
                await self._report(record, error, refuse=refuse)
            await self._mend(before, error.message)
            error.metadata["policy_version"] = str(before.number)
            raise
        except BaseException as error:  # a full disk, a fault of the backend: nobody knows what the engines hold
            await self._mend(before, f"the update to version {record.number} failed: {error!r}")
            raise
        self.canary_difference = found.version.canary_difference
        self._now_serves(found)

    async def resume(self) -> None:
        """Serves the version that served before the engines were resumed. Where they do not hold it, it is loaded; on
        failure calls are refused, and this returns."""
        trial = self._trials.get(self.record.number)
        self._gate.set(PolicyState.UPDATING)
        try:
            if trial is None or not trial.checksum:
                raise DomainError(Reason.CANARY_FAILED, "the engine tells no checksum")
            await self._check_all(trial.weights)
        except DomainError as error:
            log.info("weights are loaded again", policy=self._name, problem=error.message)
            await self._mend(self.record, "")
        else:
            self._now_serves(self.record)

    async def _begin(self, first: int) -> None:
        """Serves what the model came with as version `first`."""
        model = self._backend.model
        version = PolicyVersion(
            policy_version=first,
            kind=WeightsKind.ORIGINAL,
            state=VersionState.SERVING,
            sha256="",
            fingerprint=model.fingerprint,
            created_at=datetime.now(UTC),
            model=model.model,
        )
        record = Record(version, origin=first, source=source_of(self._settings), setup=self._setup)
        file = WeightsFile(None, WeightsKind.ORIGINAL, first, "")
        if self._backend.policy_version == first:
            found = await self._inspect(record, file)
        else:
            found = await self._load(record, file)
        await asyncio.to_thread(self._store.begin, found)
        self._now_serves(found)

    async def _inspect(self, record: Record, file: WeightsFile) -> Record:
        """Checks the engines as they are. They are loaded again where they do not agree."""
        trial = self._trials[record.number] = self._trial_of(record, file, [])
        if not self.takes_weights:
            return record
        try:
            await self._check_all(file)
        except DomainError as error:
            log.warning("the engines do not hold what they should", policy=self._name, problem=error.message)
            return await self._load(record, file)
        return self._found(record, trial)

    async def _check_all(self, file: WeightsFile) -> None:
        """Raises DomainError CANARY_FAILED. An engine that is away is checked when it comes back, by the backend."""
        for replica in self._backend.replicas:
            try:
                if replica.info.serving:
                    await self._admit(replica, file)
            except DomainError as error:
                if error.reason is not Reason.ENGINE_UNAVAILABLE:
                    raise

    async def _is_same_model(self, served: Record) -> bool:
        """Whether the folder that a model is loaded from has the content that it had."""
        if served.version.fingerprint != self._backend.model.fingerprint:
            return False
        before = served.version.engine_checksum
        if served.version.kind is not WeightsKind.ORIGINAL or served.setup != self._setup or not before:
            return True
        try:
            found = [await replica.checksum() for replica in self._backend.replicas if replica.info.serving]
        except DomainError:  # it is away: whether it holds the right weights is checked when it comes back
            return True
        return all(checksum == before for checksum in found)

    async def _recover(self, served: Record) -> None:
        """After a restart: the version that served, or the newest before it whose file is whole and passes."""
        self.record = served
        known = await asyncio.to_thread(self._store.of_model, served.origin)
        kept = [served, *(record for record in known if record.version.state is VersionState.KEPT)]
        for record in kept:
            try:
                file = await asyncio.to_thread(self._store.file, record)
                loaded = record.number == self._backend.policy_version
                found = await (self._inspect(record, file) if loaded else self._load(record, file))
            except DomainError as error:
                if error.reason not in (*_DAMAGED, Reason.CANARY_FAILED) or record is kept[-1]:
                    raise
                log.error("a version cannot be restored", policy=self._name, version=record.number, problem=str(error))
                change = self._store.refuse if error.reason is Reason.CANARY_FAILED else self._store.lose
                await asyncio.to_thread(change, record.now(problem=error.message))
            else:
                await asyncio.to_thread(self._store.serve, found)
                self._now_serves(found)
                return

    async def _load(self, record: Record, file: WeightsFile) -> Record:
        """Has all engines load and check these weights, while calls wait. Returns what was found."""
        known = await asyncio.to_thread(self._store.of_model, record.origin)
        trial = self._trials[record.number] = self._trial_of(record, file, known)
        self._gate.passed.discard(record.number)
        self._gate.set(PolicyState.UPDATING)
        await self._backend.update_weights(file, self._admit)
        return self._found(record, trial)

    async def _mend(self, record: Record, problem: str) -> None:
        """Serves this version, which passed before, or nothing."""
        for delay in (*_RESTORE_DELAYS, None):
            try:
                file = await asyncio.to_thread(self._store.file, record)
                found = await self._load(record, file)
            except Exception as error:  # noqa: BLE001 - whatever it is, the engines hold nothing that may be served
                unavailable = isinstance(error, DomainError) and error.reason is Reason.ENGINE_UNAVAILABLE
                if unavailable and delay is not None:
                    await asyncio.sleep(delay)
                    continue
                if isinstance(error, DomainError) and error.reason is Reason.CANARY_FAILED:
                    metrics.CANARY_FAILURES.labels(self._name).inc()
                problem = "; ".join(filter(None, (problem, f"version {record.number} cannot be served: {error}")))
                self._gate.set(PolicyState.REFUSED, problem)
                log.error("policy refused", policy=self._name, policy_version=record.number, problem=problem)
                return
            self._now_serves(found, problem)
            return

    async def _report(self, record: Record, error: DomainError, *, refuse: bool) -> None:
        metrics.CANARY_FAILURES.labels(self._name).inc()
        log.error("canary failed", policy=self._name, policy_version=record.number, problem=error.message)
        if refuse:
            failed = record.now(problem=error.message, canary_difference=self.canary_difference)
            await asyncio.to_thread(self._store.refuse, failed)

    async def _admit(self, replica: Replica, weights: WeightsFile) -> None:
        """The backend's `Admission`, also of a replica that comes back later."""
        trial = self._trials.get(weights.policy_version)
        if trial is None:
            message = f"version {weights.policy_version} is not the one that serves"
            raise DomainError(Reason.CANARY_FAILED, message)
        try:
            await trial.admit(replica)
        except DomainError as error:
            if error.reason is Reason.CANARY_FAILED and self._gate.phase is not PolicyState.UPDATING:
                metrics.CANARY_FAILURES.labels(self._name).inc()
                log.error("canary failed", policy=self._name, engine=replica.info.address, problem=error.message)
            raise

    def _trial_of(self, record: Record, file: WeightsFile, known: Sequence[Record]) -> Trial:
        expected = ""
        others = {}
        for other in known:
            checksum = other.version.engine_checksum
            if not checksum or other.setup != self._setup or other.version.state is VersionState.REFUSED:
                continue
            if other.version.sha256 == record.version.sha256:
                expected = checksum
            else:
                others[checksum] = other
        return Trial(file, self.tolerance, self._backend.model.dtype, expected, others, self._alike)

    async def _alike(self, weights: WeightsFile, other: Record) -> bool:
        """Whether engines cannot tell the weights from another version's: the first that a trainer publishes are often
        those that the model came with, and a small step can vanish in bfloat16."""
        from mulligan.policy.huggingface.compare import alike, alike_original

        try:
            if other.version.kind is WeightsKind.ORIGINAL:
                return await asyncio.to_thread(alike_original, weights, self._settings.model, self._backend.model.dtype)
            file = await asyncio.to_thread(self._store.file, other)
        except DomainError:  # its file is gone
            return False
        return await asyncio.to_thread(alike, weights, file, self._backend.model.dtype)

    def _found(self, record: Record, trial: Trial) -> Record:
        found = record.now(canary_difference=trial.difference, engine_checksum=trial.checksum, problem="")
        return replace(found, setup=self._setup)

    def _now_serves(self, record: Record, problem: str = "") -> None:
        self.record = record
        self._trials = {record.number: self._trials[record.number]}
        self._gate.open(record.number, problem)

    @property
    def _setup(self) -> str:
        """Equal for engines whose checksums of equal weights are equal."""
        parts = [self._settings.backend, self._backend.model.dtype, *self._settings.own.setup]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
