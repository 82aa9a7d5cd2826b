"""What a learner server is started with, and what one learner is created with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mulligan.trainer.settings import ModelSettings, OptimizerSettings


@dataclass(frozen=True, slots=True)
class LearnerServerSettings:
    """Of the process. `microbatch_tokens` bounds the padded tokens that are in memory at once (activations grow with
    it); a sequence that is longer runs alone."""

    weights_folder: Path  # where published weights go; the policy service reads them there
    checkpoint_folder: Path
    device: str = "cpu"  # as torch names it: "cpu", "cuda", "cuda:1"
    threads: int = 0  # of torch on the CPU; 0 leaves torch's own choice. Deterministic learners use 1.
    microbatch_tokens: int = 4096
    keep_weights: int = 3  # published versions; the policy may still be loading an older one
    max_learners: int = 1


@dataclass(frozen=True, slots=True)
class LearnerInfo:
    """A learner that a server holds. `idle` and `lease_left` are in seconds; no `lease_left`: it is kept for ever."""

    learner_id: str
    owner: str
    model: str
    optimizer_steps: int
    idle: float
    lease_left: float | None


@dataclass(frozen=True, slots=True)
class LearnerSpec:
    """Of one learner. Two equal specs at the same server make equal learners."""

    model: ModelSettings = ModelSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    seed: int = 0
    deterministic: bool = False
    keep_checkpoints: int = 0  # those furthest on, and always the last two; 0 keeps all
