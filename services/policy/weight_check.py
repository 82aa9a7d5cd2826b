"""Whether an engine holds the weights that it was given.

Its log-probabilities are compared with the trainer's, and its own checksum with those of all other versions. Each
replica is checked.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import CanaryProbe, VersionState, WeightsKind
from mulligan.common.safetensors_header import BadSafetensors, read_header
from mulligan.policy.backend import Replica, WeightsFile
from mulligan.policy.version_table import VersionRecord

# As safetensors and as torch name them.
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
FLOAT32_TOLERANCE = 1e-3
LOW_PRECISION_TOLERANCE = 0.25


def tolerance_of(setting: float, dtype: str) -> float:
    """The largest difference in log-probability that passes. 0 in the settings: it depends on `dtype`."""
    return setting or (FLOAT32_TOLERANCE if dtype in ("float32", "float64") else LOW_PRECISION_TOLERANCE)


def largest_difference(probes: Sequence[CanaryProbe], log_probs: Sequence[Sequence[float]]) -> float:
    """Of absolute differences in log-probability. NaN if any is NaN; infinite if the engine answered more or fewer."""
    largest = 0.0
    if len(probes) != len(log_probs):
        return math.inf
    for probe, found in zip(probes, log_probs, strict=True):
        if len(found) != len(probe.log_probs):
            return math.inf
        for ours, theirs in zip(found, probe.log_probs, strict=True):
            difference = abs(ours - theirs)
            if math.isnan(difference):
                return difference
            largest = max(largest, difference)
    return largest


def known_checksums(
    record: VersionRecord, known: Sequence[VersionRecord], setup: str
) -> tuple[str, dict[str, VersionRecord]]:
    """What engines of this setup found before: the checksum of the same weights, "" if they never had them, and the
    versions of all other weights by their checksums."""
    expected = ""
    others = {}
    for other in known:
        checksum = other.version.engine_checksum
        if not checksum or other.setup != setup or other.version.state is VersionState.REFUSED:
            continue
        if other.version.sha256 == record.version.sha256:
            expected = checksum
        else:
            others[checksum] = other
    return expected, others


@dataclass(slots=True)
class WeightCheck:
    """The check of one version's weights. `admit` is called for each replica that has loaded them.

    `expected` and `others` are of `known_checksums`. `alike` tells whether one of the others holds the same numbers in
    another file: engines find the same checksum then.
    """

    weights: WeightsFile
    tolerance: float
    dtype: str  # of the engines' arithmetic
    expected: str
    others: Mapping[str, VersionRecord]
    alike: Callable[[WeightsFile, VersionRecord], Awaitable[bool]]
    difference: float | None = None  # the largest of all replicas; None if nothing was compared
    checksum: str = ""

    async def admit(self, replica: Replica) -> None:
        """Raises DomainError CANARY_FAILED, with metadata, or what the engine raises."""
        if self.weights.canary:
            await self._compare(replica)
        await self._compare_checksum(replica)

    async def _compare(self, replica: Replica) -> None:
        probes = self.weights.canary
        scored = await replica.score([probe.token_ids for probe in probes], 1.0)
        found = largest_difference(probes, scored.log_probs)
        if self.difference is None or not found <= self.difference:
            self.difference = found
        if not found <= self.tolerance:  # NaN is no agreement
            raise DomainError(
                Reason.CANARY_FAILED,
                f"version {self.weights.policy_version}{_at(replica)}: log-probabilities differ from the trainer's by "
                f"{found:.3g}, more than {self.tolerance:.3g}{_dtypes_differ(self.weights, self.dtype)}",
                difference=found,
                tolerance=self.tolerance,
            )

    async def _compare_checksum(self, replica: Replica) -> None:
        found = await replica.checksum()
        if not found:  # this engine has none
            return
        expected = self.expected or self.checksum
        if expected and found != expected:
            raise self._wrong(replica, found, f"another one, {expected}, was found for the same weights")
        other = self.others.get(found)
        if not expected and other is not None and not await self.alike(self.weights, other):
            raise self._wrong(
                replica, found, f"that is version {other.number}: the engine did not take the new weights"
            )
        self.checksum = found

    def _wrong(self, replica: Replica, checksum: str, why: str) -> DomainError:
        return DomainError(
            Reason.CANARY_FAILED,
            f"version {self.weights.policy_version}{_at(replica)}: the engine's checksum is {checksum}: {why}",
            checksum=checksum,
        )


def _dtypes_differ(weights: WeightsFile, dtype: str) -> str:
    """Names a likely cause: the trainer computes in a lower precision than the engine."""
    if weights.kind is not WeightsKind.FULL or weights.safetensors is None:
        return ""
    try:
        tensors = read_header(weights.safetensors).values()
    except (BadSafetensors, OSError):
        return ""
    found = {_DTYPES[tensor.dtype] for tensor in tensors if tensor.dtype in _DTYPES}
    if not dtype or found <= {dtype}:
        return ""
    return f" (the dtypes differ: the weights are {' and '.join(sorted(found))}, the engine computes in {dtype})"


def _at(replica: Replica) -> str:
    address = replica.info.address
    return f" at {address}" if address else ""
