"""Whether an engine serves the weights that it was given: its log-probabilities against the trainer's, and its own
checksum of the weights against those of all other versions; on every replica."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from mulligan.common.errors import DomainError, Reason, invalid_field
from mulligan.common.inference import CanaryProbe, Feature, WeightsKind
from mulligan.common.safetensors_header import BadSafetensors, read_header
from mulligan.policy.backend import ModelInfo, Replica, WeightsFile
from mulligan.policy.versions import Record

# As safetensors and as torch name them.
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
FLOAT32_TOLERANCE = 1e-3
LOW_PRECISION_TOLERANCE = 0.25


def tolerance_of(setting: float, dtype: str) -> float:
    """The largest difference in log-probability; 0 in the settings leaves the choice to the arithmetic."""
    return setting or (FLOAT32_TOLERANCE if dtype in ("float32", "float64") else LOW_PRECISION_TOLERANCE)


def check_probes(probes: Sequence[CanaryProbe], model: ModelInfo) -> None:
    """Raises DomainError INVALID_FIELD, or UNSUPPORTED_OPTION where the engine cannot score."""
    if probes and Feature.SCORE not in model.features:
        raise DomainError(
            Reason.UNSUPPORTED_OPTION, f"canary: {model.model} cannot score", field="canary", feature=Feature.SCORE
        )
    for index, probe in enumerate(probes):
        field = f"canary[{index}]"
        count = len(probe.token_ids)
        if count < 2 or (model.context_length and count > model.context_length):
            raise invalid_field(f"{field}.token_ids", f"2 to {model.context_length or 65536} tokens")
        if any(token < 0 or (model.vocabulary_size and token >= model.vocabulary_size) for token in probe.token_ids):
            raise invalid_field(f"{field}.token_ids", f"ids from 0 to {model.vocabulary_size - 1}")
        if len(probe.log_probs) != count - 1:
            raise invalid_field(f"{field}.log_probs", f"{count - 1} values, one per token after the first")
        if not all(math.isfinite(value) for value in probe.log_probs):
            raise invalid_field(f"{field}.log_probs", "finite values")


def greatest_difference(probes: Sequence[CanaryProbe], log_probs: Sequence[Sequence[float]]) -> float:
    """In absolute log-probability; NaN when any is, infinite when the engine answered another number of them."""
    greatest = 0.0
    if len(probes) != len(log_probs):
        return math.inf
    for probe, found in zip(probes, log_probs, strict=True):
        if len(found) != len(probe.log_probs):
            return math.inf
        for ours, theirs in zip(found, probe.log_probs, strict=True):
            difference = abs(ours - theirs)
            if math.isnan(difference):
                return difference
            greatest = max(greatest, difference)
    return greatest


@dataclass(slots=True)
class Trial:
    """The check of one version's weights, replica by replica.

    `expected` is the checksum that engines found before for the same weights, "" when none did. `others` are the
    checksums of all other weights of the model, and the versions that have them. `alike` tells whether such a version
    is the same numbers in another file, so that engines cannot but find the same checksum.
    """

    weights: WeightsFile
    tolerance: float
    dtype: str  # of the engines' arithmetic
    expected: str
    others: Mapping[str, Record]
    alike: Callable[[WeightsFile, Record], Awaitable[bool]]
    difference: float | None = None  # the greatest of all replicas
    checksum: str = ""

    async def admit(self, replica: Replica) -> None:
        """Raises DomainError CANARY_FAILED, with metadata, or what the engine raises."""
        if self.weights.canary:
            await self._compare(replica)
        await self._compare_checksum(replica)

    async def _compare(self, replica: Replica) -> None:
        probes = self.weights.canary
        scored = await replica.score([probe.token_ids for probe in probes], 1.0)
        found = greatest_difference(probes, scored.log_probs)
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
    """A likely cause: rounding, of a trainer that computes in less than the engine."""
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
