"""Settings of a learner server, and of one learner."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal

from mulligan.trainer.settings import OptimizerSettings, TrainedModelSettings

Attention = Literal["auto", "sdpa", "flex"]
# Logits are computed in pieces of at most this many float32 values: 64 Mi are 256 MiB, or 441 tokens with a vocabulary
# of 152 thousand. The backward pass computes each piece again.
LOGITS_AT_ONCE = 2**26


@dataclass(frozen=True, slots=True)
class LearnerServerSettings:
    """Settings of the process.

    `microbatch_tokens` limits the tokens that a micro-batch computes: shared prefixes count once, padding counts. The
    memory of activations grows with it. A longer sequence runs alone. The default is for a CPU, where more is no
    faster.
    """

    weights_folder: Path  # where published weights go; the policy service reads them there
    checkpoint_folder: Path
    device: str = "cpu"  # as torch names it: "cpu", "cuda", "cuda:1"
    threads: int = 0  # of torch on the CPU; 0 leaves torch's own choice. Deterministic learners use 1.
    microbatch_tokens: int = 768
    gradient_checkpointing: bool = False  # the backward pass computes activations again: less memory, more time
    attention: Attention = "auto"  # of shared prefixes; auto: flex on a GPU that can, else sdpa
    weights_access: Literal["owner", "group"] = "owner"  # who may read published weights
    keep_weights: int = 3  # published versions; the policy may be loading an older one
    max_learners: int = 1
    lease_seconds: float | None = 3600.0  # of a learner whose caller asks for no lease; None: for ever
    models_folder: Path | None = None  # CreateLearner takes folders below it; without it, hub ids alone


@dataclass(frozen=True, slots=True)
class LearnerInfo:
    """A learner of a server. `idle` and `lease_left` are in seconds; without lease, `lease_left` is None."""

    learner_id: str
    owner: str
    model: str
    optimizer_steps: int
    idle: float
    lease_left: float | None


@dataclass(frozen=True, slots=True)
class LearnerSpec:
    """Settings of one learner. Equal specs at the same server give equal learners."""

    model: TrainedModelSettings = TrainedModelSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    seed: int = 0
    deterministic: bool = False
    keep_checkpoints: int = 0  # those with the most steps, but at least two; 0 keeps all


class LearnerUse(StrEnum):
    """What a server of learners says of an id."""

    FREE = "free"
    IN_USE = "in_use"  # by a learner, or by checkpoints, which a new learner with this id could load
    UNTOLD = "untold"  # there is no such learner, and of checkpoints the server says nothing
