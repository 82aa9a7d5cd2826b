"""One loaded model of a policy: its engines, the version of the weights that they serve, and the calls that pass.

A version of the weights goes through these states. `Deployment` changes them, `versions.py` records the last five.

    state      how a version gets there                calls meanwhile   what follows
    staged     UpdateWeights: its file is in the       pass              loading
               store, with the right checksum
    loading    every engine loads the file             wait              checking; forgotten if engines refuse it
    checking   every engine is asked for               wait              serving; refused if an engine fails, or kept
               log-probabilities and its checksum                        if it was kept before
    serving    every engine passed                     pass              kept; withdrawn
    kept       a newer version serves, its file stays  -                 loading, by Rollback; withdrawn; removed
    refused    an engine failed its check              -                 none: the number is never loaded again
    withdrawn  Rollback chose a version before it      -                 none: the number is never loaded again
    removed    its file is gone: too many newer ones,  -                 staged, if it is published again before a
               a damaged file, or another model                          greater version serves

A failure between staging and serving leaves the version that served before. If the engines may hold other weights by
then, it is loaded and checked in its turn, while calls wait. If that fails, too, the deployment is REFUSED: calls fail
until an update or a rollback succeeds.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import structlog

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import (
    PolicyState,
    PolicyVersion,
    PublishedWeights,
    VersionSpan,
    VersionState,
    WeightsKind,
)
from mulligan.common.tasks import Broadcast
from mulligan.policy import metrics, preflight
from mulligan.policy.backend import Backend, Replica, WeightsFile
from mulligan.policy.config import PolicySettings
from mulligan.policy.model_settings import ModelSettings
from mulligan.policy.uploads import Uploads, find_weights
from mulligan.policy.version_table import VersionRecord
from mulligan.policy.versions import VersionStore, source_of
from mulligan.policy.weight_check import WeightCheck, known_checksums, tolerance_of

log = structlog.get_logger()
_RETRY_AFTER = timedelta(seconds=1)
# After these the backend serves what it served before.
_UNTOUCHED = (Reason.MODEL_MISMATCH, Reason.WEIGHTS_NOT_FOUND, Reason.ENGINE_UNAVAILABLE, Reason.DISK_FULL)
_DAMAGED = (Reason.WEIGHTS_NOT_FOUND, Reason.CHECKSUM_MISMATCH)
_KEPT_PASSED = 4096
_PUT_BACK_DELAYS = (0.2, 1.0, 5.0)  # seconds, while engines are unavailable


class Deployment:
    """`Policy` makes it, calls `start` first, and makes one change at a time: `update_weights`, `rollback`,
    `release_memory`, `resume_memory`. `store` is shared by all deployments of a policy, which closes it after them.

    A call enters `serving`, which lets it pass, wait or fail; asks `backend`; and asks `verified`, which waits while
    the weights of its answer are being checked. `verified` is False if they were refused: the call samples again.

    An update stages the file, and `_exchange` does the rest: `_load` has the engines load it and check it by
    `_check_replica`, the store records it, and `_now_serves` lets calls pass; on failure `_put_back` runs.
    """

    def __init__(
        self,
        name: str,
        settings: ModelSettings,
        service: PolicySettings,
        backend: Backend,
        store: VersionStore,
        folder: Path,
        uploads: Uploads,
    ):
        self.name = name
        self.settings = settings
        self.backend = backend
        self.folder = folder  # the backend's own
        self.record: VersionRecord  # of the version that serves, or would if the engines held it
        self.canary_tolerance = tolerance_of(service.canary_tolerance, backend.model.dtype)
        self.canary_difference: float | None = None  # largest in the last weight check; None if nothing was compared
        self.in_flight = 0  # calls inside `serving`
        self._samples = 0  # that run or wait in the engine
        self._most_samples = backend.model.capacity or settings.max_queue + preflight.MOST_SAMPLES
        # Kept by the policy: calls inside and before `serving`, when a session's last call ended, and the end.
        self.calls = 0
        self.last_asked = float("-inf")
        self.closed = False
        self._store = store
        self._uploads = uploads
        self._weights_folder = service.weights_folder
        self._phase = PolicyState.UPDATING
        self._problem = ""
        self._may_resume = True  # memory that is released
        self._changed = Broadcast()
        self._passed: set[int] = set()  # versions whose weights passed the check when they were loaded last
        self._checks: dict[int, WeightCheck] = {}  # of the version that serves, and of the one that is being loaded
        self.label = metrics.NAMES.label(name)  # of its metrics
        metrics.begin(name)
        self._tokens = metrics.SAMPLED_TOKENS.labels(self.label)
        # Equal for engines whose checksums of equal weights are equal.
        parts = [settings.backend, backend.model.dtype, *settings.own.setup]
        self._setup = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    @property
    def policy_version(self) -> int:
        return self.record.number

    @property
    def state(self) -> PolicyState:
        if self._phase is PolicyState.SERVING and not self._available():
            return PolicyState.UNAVAILABLE
        return self._phase

    @property
    def problem(self) -> str:
        """What keeps it from serving, or what went wrong with the last update."""
        if self._problem or self.state is not PolicyState.UNAVAILABLE:
            return self._problem
        return "; ".join(sorted({replica.info.problem for replica in self.backend.replicas} - {""}))

    @property
    def healthy(self) -> bool:
        """Whether calls are answered, if only after an update."""
        return self.state not in (PolicyState.REFUSED, PolicyState.UNAVAILABLE)

    # Calls

    @asynccontextmanager
    async def serving(self, min_policy_version: int | None = None, version_wait: float = 0.0) -> AsyncIterator[None]:
        """Around one call. Waits while weights change or memory is released, and at most `version_wait` seconds for
        the version.

        Raises DomainError POLICY_VERSION_TOO_OLD, POLICY_REFUSED, ENGINE_UNAVAILABLE or UNKNOWN_POLICY.
        """
        if self._phase is not PolicyState.SERVING or (min_policy_version or 0) > self.policy_version:
            await self._wait_for(min_policy_version or 0, version_wait)
        if not self._available():
            message = f"no engine of the policy {self.name} answers"
            raise DomainError(Reason.ENGINE_UNAVAILABLE, message, retry_after=_RETRY_AFTER)
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1
            if self.in_flight == 0:
                self._changed.wake_all()

    def refuse_full(self, count: int) -> None:
        """Raises DomainError QUEUE_FULL if there is no room for so many samples: then nothing is made for them. Only a
        call that may have room later is told to come again."""
        most = self._most_samples
        if count > most:
            message = f"n: expected at most {most}, the samples that this policy runs and keeps waiting, not {count}"
            raise DomainError(Reason.QUEUE_FULL, message)
        if self._samples + count > most:
            message = f"{self._samples} of at most {most} samples run or wait: no room for {count} more"
            raise DomainError(Reason.QUEUE_FULL, message, retry_after=_RETRY_AFTER)

    @asynccontextmanager
    async def sampling(
        self, count: int, min_policy_version: int | None = None, version_wait: float = 0.0
    ) -> AsyncIterator[None]:
        """As `serving`, around a call for so many samples. Raises DomainError QUEUE_FULL, too."""
        async with self.serving(min_policy_version, version_wait):
            self.refuse_full(count)
            self._samples += count
            try:
                yield
            finally:
                self._samples -= count

    async def verified(self, spans: Sequence[VersionSpan]) -> bool:
        """Whether these versions passed their check; waits while one is being checked. False if one was refused, or not
        loaded after all: the caller samples again from the start. Asked once of all that is answered: what passes is
        counted as sampled. Raises DomainError POLICY_REFUSED when there is nothing to sample from."""
        while not (passed := self._passed.issuperset(span.policy_version for span in spans)):
            self._refuse_refused()
            if self._phase is not PolicyState.UPDATING:
                break
            await self._changed.wait()
        if passed:
            self._tokens.inc(sum(span.token_count for span in spans))
        return passed

    # Changes

    def refuse_released(self) -> None:
        """Raises DomainError ENGINE_UNAVAILABLE while memory is released: calls wait for it, and a change of weights or
        of the model would leave them waiting."""
        if self._phase is PolicyState.RELEASED:
            message = f"the memory of {self.name} is released: ResumeMemory comes first"
            raise DomainError(Reason.ENGINE_UNAVAILABLE, message)

    async def start(self, commit: Callable[[], None] = lambda: None) -> None:
        """Serves the version that served before a restart, or else the weights that the model came with. `commit` makes
        last that such a model was loaded, together with the record of its version.

        Raises DomainError when the engines take none of them, and what `commit` raises.
        """
        first = self.backend.policy_version
        served = await asyncio.to_thread(self._store.serving)
        known = await asyncio.to_thread(self._store.get, first)
        if known is None:
            await self._begin(first, commit)
        elif (
            served is None
            or served.origin != first
            or not self._takes(served.version.kind)
            or not await self._is_same_model(served)
        ):
            following = await asyncio.to_thread(self._store.next_version)  # never two meanings of one version
            log.warning("another model than before", policy=self.name, policy_version=following)
            await self._begin(following, commit)
        else:
            await self._recover(served)
        log.info("model loaded", **self._facts())

    async def update_weights(self, weights: PublishedWeights) -> float | None:
        """Loads, checks and serves these weights; returns the largest difference that the canary found.

        Raises DomainError as PolicyAdminService.UpdateWeights does.
        """
        started = time.monotonic()
        number = weights.policy_version
        present = self.record
        is_present = (number, weights.sha256) == (present.number, present.version.sha256)
        if is_present and self._phase is PolicyState.SERVING:
            return present.version.canary_difference
        known = await asyncio.to_thread(self._store.get, number)
        following = await asyncio.to_thread(self._store.next_version)
        self._refuse_change()
        preflight.check_update(weights, self.backend.model, present, known, following)
        if is_present:  # the engines could not be brought back to it: another try
            file = await asyncio.to_thread(self._store.file, present)
            await self._exchange(present, file, self._store.serve)
        else:
            await self._load_new(weights)
        await self._uploads.remove(weights.uri)
        seconds = time.monotonic() - started
        metrics.UPDATE_SECONDS.labels(self.label).observe(seconds)
        log.info("weights updated", seconds=round(seconds, 3), **self._facts())
        return self.record.version.canary_difference

    async def rollback(self, policy_version: int) -> None:
        """Raises DomainError as PolicyAdminService.Rollback does."""
        self._refuse_change()
        present = self.record
        record = await asyncio.to_thread(self._store.get, policy_version)
        kept = record is not None and record.version.state in (VersionState.KEPT, VersionState.SERVING)
        if record is None or not kept or record.origin != present.origin:
            why = f": {record.version.problem}" if record is not None and record.is_lost else ""
            raise DomainError(Reason.VERSION_NOT_KEPT, f"version {policy_version} of {self.name} is not kept{why}")
        if policy_version == present.number and self._phase is PolicyState.SERVING:
            return
        try:
            file = await asyncio.to_thread(self._store.file, record)
        except DomainError as error:
            problem = error.message
            log.error("a kept version is damaged", policy=self.name, policy_version=policy_version, problem=problem)
            message = f"version {policy_version} of {self.name} is damaged: {problem}"
            raise DomainError(Reason.VERSION_NOT_KEPT, message) from error
        reason = f"rolled back to version {policy_version}"
        await self._exchange(record, file, lambda found: self._store.serve(found, withdrawn=reason))
        log.warning("rolled back", before=present.number, **self._facts())

    async def release_memory(self) -> None:
        """Raises DomainError as PolicyAdminService.ReleaseMemory does."""
        preflight.check_release(self.backend.model)
        if self._phase is PolicyState.RELEASED:
            return
        phase = self._phase
        problem = self._problem
        self._set_phase(PolicyState.RELEASED)
        try:
            while self.in_flight:
                await self._changed.wait()
            await self.backend.release_memory()
        except BaseException:
            self._set_phase(phase, problem)
            raise
        log.info("memory released", **self._facts())

    async def resume_memory(self) -> None:
        """Raises DomainError as PolicyAdminService.ResumeMemory does. Engines that do not hold the version that served
        load it again."""
        preflight.check_release(self.backend.model)
        if self._phase is not PolicyState.RELEASED:
            return
        await self.backend.resume_memory()
        check = self._checks.get(self.record.number)
        self._set_phase(PolicyState.UPDATING)
        try:
            if check is None or not check.checksum:
                raise DomainError(Reason.CANARY_FAILED, "the engine tells no checksum")
            await self._check_all(check.weights)
        except DomainError as error:
            log.info("weights are loaded again", policy=self.name, problem=error.message)
            await self._put_back(self.record, "")
        else:
            self._now_serves(self.record)
        self._refuse_refused()
        log.info("memory resumed", **self._facts())

    def expect_no_resume(self) -> None:
        """From now on, calls do not wait for released memory: they fail."""
        self._may_resume = False
        self._changed.wake_all()

    async def close(self) -> None:
        """Calls in flight fail."""
        await self.backend.close()
        await asyncio.to_thread(self._store.end, self.record.origin)

    # The gate

    def _set_phase(self, phase: PolicyState, problem: str | None = None) -> None:
        """Calls pass (SERVING), wait (UPDATING, RELEASED) or fail (REFUSED) from now on; those that passed go on."""
        self._phase = phase
        if problem is not None:
            self._problem = problem
        self._changed.wake_all()

    def _now_serves(self, record: VersionRecord, problem: str = "") -> None:
        self.record = record
        self._checks = {record.number: self._checks[record.number]}
        self._passed.add(record.number)
        if len(self._passed) > _KEPT_PASSED:  # an answer names versions that served while it was sampled
            self._passed.discard(min(self._passed - {record.number}))
        self._set_phase(PolicyState.SERVING, problem)

    async def _wait_for(self, version: int, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while True:
            self._refuse_refused()
            if self._phase is PolicyState.RELEASED and not self._may_resume:
                message = f"the policy {self.name} was unloaded while its memory was released"
                raise DomainError(Reason.UNKNOWN_POLICY, message, policy=self.name)
            if self._phase is not PolicyState.SERVING:
                await self._changed.wait()
                continue
            if version <= self.policy_version:
                return
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await self._changed.wait()
            except TimeoutError:
                if self._phase is PolicyState.SERVING and version > self.policy_version:
                    message = f"version {self.policy_version} serves; at least {version} was asked for"
                    reason = Reason.POLICY_VERSION_TOO_OLD
                    raise DomainError(reason, message, policy_version=self.policy_version) from None

    def _refuse_refused(self) -> None:
        if self._phase is PolicyState.REFUSED:
            raise DomainError(Reason.POLICY_REFUSED, f"the policy {self.name} serves nothing: {self._problem}")

    def _refuse_change(self) -> None:
        if self.settings.frozen:
            raise DomainError(Reason.POLICY_FROZEN, f"the weights of {self.name} are frozen by its settings")
        self.refuse_released()

    def _available(self) -> bool:
        replicas = self.backend.replicas
        return not replicas or any(replica.info.serving for replica in replicas)

    # From one version to another, and back

    async def _load_new(self, weights: PublishedWeights) -> None:
        number = weights.policy_version
        path = await asyncio.to_thread(find_weights, weights.uri, self._weights_folder, self._uploads)
        published = WeightsFile(path, weights.kind, number, weights.sha256, weights.canary)
        try:
            file = await asyncio.to_thread(self._store.stage, published)
            await self._exchange(self._new_record(file, self.record.origin), file, self._store.serve, refuse=True)
        finally:
            if self.policy_version != number:
                await asyncio.to_thread(self._store.discard, number)

    async def _exchange(
        self, record: VersionRecord, file: WeightsFile, commit: Callable[[VersionRecord], None], *, refuse: bool = False
    ) -> None:
        """Serves these weights, or what served before; then it raises what went wrong.

        `commit` records that they serve. With `refuse` a version that fails its check is never loaded again.
        """
        before = self.record
        phase = self._phase
        problem = self._problem
        try:
            found = await self._load(record, file)
            await asyncio.to_thread(commit, found)
        except DomainError as error:
            self.canary_difference = self._checks[record.number].difference
            if error.reason in _UNTOUCHED and self.backend.policy_version == before.number:
                self._set_phase(phase, problem)
                self._checks.pop(record.number, None)
                raise
            if error.reason is Reason.CANARY_FAILED:
                self._count_failure(error, policy_version=record.number)
                if refuse:
                    failed = record.now(problem=error.message, canary_difference=self.canary_difference)
                    await asyncio.to_thread(self._store.refuse, failed)
            await self._put_back(before, error.message)
            error.metadata["policy_version"] = str(before.number)
            raise
        except BaseException as error:  # a full disk, a fault of the backend: nobody knows what the engines hold
            await self._put_back(before, f"the update to version {record.number} failed: {error!r}")
            raise
        self.canary_difference = found.version.canary_difference
        self._now_serves(found)

    async def _load(self, record: VersionRecord, file: WeightsFile) -> VersionRecord:
        """Has all engines load and check these weights, while calls wait. Returns what was found."""
        known = await asyncio.to_thread(self._store.of_model, record.origin)
        self._new_check(record, file, known)
        self._passed.discard(record.number)
        self._set_phase(PolicyState.UPDATING)
        await self.backend.update_weights(file, self._check_replica)
        return self._found(record)

    async def _put_back(self, record: VersionRecord, problem: str) -> None:
        """Serves this version, which passed before, or nothing."""
        for delay in (*_PUT_BACK_DELAYS, None):
            try:
                file = await asyncio.to_thread(self._store.file, record)
                found = await self._load(record, file)
            except Exception as error:  # noqa: BLE001 - whatever it is, the engines hold nothing that may be served
                reason = error.reason if isinstance(error, DomainError) else None
                if reason is Reason.ENGINE_UNAVAILABLE and delay is not None:
                    await asyncio.sleep(delay)
                    continue
                if reason is Reason.CANARY_FAILED:
                    metrics.CANARY_FAILURES.labels(self.label).inc()
                problem = "; ".join(filter(None, (problem, f"version {record.number} cannot be served: {error}")))
                self._set_phase(PolicyState.REFUSED, problem)
                log.error("policy refused", policy=self.name, policy_version=record.number, problem=problem)
                return
            self._now_serves(found, problem)
            return

    # The start

    async def _begin(self, first: int, commit: Callable[[], None]) -> None:
        """Serves what the model came with as version `first`."""
        file = WeightsFile(None, WeightsKind.ORIGINAL, first, "")
        record = self._new_record(file, first)
        loaded = self.backend.policy_version == first
        found = await (self._check_loaded(record, file) if loaded else self._load(record, file))
        await asyncio.to_thread(self._store.begin, found, commit)
        self._now_serves(found)

    async def _recover(self, served: VersionRecord) -> None:
        """After a restart: the version that served, or the newest before it whose file is whole and passes."""
        known = await asyncio.to_thread(self._store.of_model, served.origin)
        kept = [served, *(record for record in known if record.version.state is VersionState.KEPT)]
        for record in kept:
            try:
                file = await asyncio.to_thread(self._store.file, record)
                loaded = record.number == self.backend.policy_version
                found = await (self._check_loaded(record, file) if loaded else self._load(record, file))
            except DomainError as error:
                if error.reason not in (*_DAMAGED, Reason.CANARY_FAILED) or record is kept[-1]:
                    raise
                log.error("a version cannot be restored", policy=self.name, version=record.number, problem=str(error))
                change = self._store.refuse if error.reason is Reason.CANARY_FAILED else self._store.lose
                await asyncio.to_thread(change, record.now(problem=error.message))
            else:
                await asyncio.to_thread(self._store.serve, found)
                self._now_serves(found)
                return

    def _takes(self, kind: WeightsKind) -> bool:
        """Whether the engines take weights of this kind; not so, when the settings have changed."""
        return kind is WeightsKind.ORIGINAL or preflight.WEIGHT_FEATURES[kind] in self.backend.model.features

    async def _check_loaded(self, record: VersionRecord, file: WeightsFile) -> VersionRecord:
        """Checks the engines as they are. They load the weights again if they do not hold them."""
        self._new_check(record, file, [])
        if self.backend.model.features.isdisjoint(preflight.WEIGHT_FEATURES.values()):
            return record
        try:
            await self._check_all(file)
        except DomainError as error:
            log.warning("the engines do not hold what they should", policy=self.name, problem=error.message)
            return await self._load(record, file)
        return self._found(record)

    async def _is_same_model(self, served: VersionRecord) -> bool:
        """Whether the folder that a model is loaded from has the content that it had."""
        if served.version.fingerprint != self.backend.model.fingerprint:
            return False
        before = served.version.engine_checksum
        if served.version.kind is not WeightsKind.ORIGINAL or served.setup != self._setup or not before:
            return True
        try:
            found = [await replica.checksum() for replica in self.backend.replicas if replica.info.serving]
        except DomainError:  # it is away: whether it holds the right weights is checked when it comes back
            return True
        return all(checksum == before for checksum in found)

    # The weight check

    async def _check_all(self, file: WeightsFile) -> None:
        """Raises DomainError CANARY_FAILED. An engine that is away is checked when it comes back, by the backend."""
        for replica in self.backend.replicas:
            try:
                if replica.info.serving:
                    await self._check_replica(replica, file)
            except DomainError as error:
                if error.reason is not Reason.ENGINE_UNAVAILABLE:
                    raise

    async def _check_replica(self, replica: Replica, weights: WeightsFile) -> None:
        """The backend's `Admission`, also of a replica that comes back later."""
        check = self._checks.get(weights.policy_version)
        if check is None:
            message = f"version {weights.policy_version} is not the one that serves"
            raise DomainError(Reason.CANARY_FAILED, message)
        try:
            await check.admit(replica)
        except DomainError as error:
            if error.reason is Reason.CANARY_FAILED and self._phase is not PolicyState.UPDATING:
                self._count_failure(error, engine=replica.info.address)
            raise

    def _new_check(self, record: VersionRecord, file: WeightsFile, known: Sequence[VersionRecord]) -> None:
        """`known`: the records with whose checksums an engine's is compared."""
        expected, others = known_checksums(record, known, self._setup)
        dtype = self.backend.model.dtype
        self._checks[record.number] = WeightCheck(file, self.canary_tolerance, dtype, expected, others, self._are_alike)

    async def _are_alike(self, weights: WeightsFile, other: VersionRecord) -> bool:
        """Whether engines cannot tell the weights from another version's: the first that a trainer publishes are often
        those that the model came with, and a small step can vanish in bfloat16."""
        from mulligan.policy.huggingface.compare import alike, alike_original

        try:
            if other.version.kind is WeightsKind.ORIGINAL:
                own, dtype = self.settings, self.backend.model.dtype
                return await asyncio.to_thread(alike_original, weights, own.model, dtype, own.revision)
            file = await asyncio.to_thread(self._store.file, other)
        except DomainError:  # its file is gone
            return False
        return await asyncio.to_thread(alike, weights, file, self.backend.model.dtype)

    def _found(self, record: VersionRecord) -> VersionRecord:
        """With what its check found."""
        check = self._checks[record.number]
        found = record.now(canary_difference=check.difference, engine_checksum=check.checksum, problem="")
        return replace(found, setup=self._setup)

    def _count_failure(self, error: DomainError, **facts: object) -> None:
        metrics.CANARY_FAILURES.labels(self.label).inc()
        log.error("canary failed", policy=self.name, problem=error.message, **facts)

    def _new_record(self, file: WeightsFile, origin: int) -> VersionRecord:
        version = PolicyVersion(
            policy_version=file.policy_version,
            kind=file.kind,
            state=VersionState.SERVING,
            sha256=file.sha256,
            fingerprint=self.backend.model.fingerprint,
            created_at=datetime.now(UTC),
            model=self.backend.model.model,
        )
        return VersionRecord(version, origin, source_of(self.settings), self._setup, file.canary)

    def _facts(self) -> dict[str, object]:
        version = self.record.version
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
