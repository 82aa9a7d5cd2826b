"""Every setting of a training run, with the paper's defaults (arXiv 2602.13949). Mirrors `RunConfig` of
`mulligan.trainer.v1`, field by field; the comments there say what each means."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mulligan.common.types import RetrievalStrategy

_POLICY_NAME = r"^([A-Za-z0-9][A-Za-z0-9._-]{0,63})?$"


class SecondAttempt(StrEnum):
    NONE = "none"
    REFLECTION = "reflection"
    RAW_RETRY = "raw_retry"
    TRY_AGAIN = "try_again"


class DistillationLoss(StrEnum):
    RAFT = "raft"
    CROSS_ENTROPY = "cross_entropy"


class BranchNormalization(StrEnum):
    OWN_COUNT = "own_count"
    CHAINS = "chains"
    TRAINABLE = "trainable"


class MismatchCorrection(StrEnum):
    NONE = "none"
    TRUNCATED = "truncated"
    MASKED = "masked"


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LoraSettings(_Settings):
    rank: int = Field(ge=1, le=1024)
    alpha: float | None = Field(None, gt=0)
    target_modules: tuple[str, ...] = ()


class TrainedModelSettings(_Settings):
    source: str = "embedded"
    lora: LoraSettings | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"


class OptimizerSettings(_Settings):
    learning_rate: float = Field(1e-6, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    warmup_steps: int = Field(0, ge=0)


class LossSettings(_Settings):
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.28, gt=0)
    dual_clip: float = Field(3.0, ge=0)
    kl_coefficient: float = Field(0.001, ge=0)
    entropy_coefficient: float = Field(0.0, ge=0)
    mismatch_correction: MismatchCorrection = MismatchCorrection.TRUNCATED
    mismatch_limit: float = Field(2.0, gt=1)

    @model_validator(mode="after")
    def _dual_clip_is_off_or_above_one(self) -> Self:
        if 0 < self.dual_clip <= 1:
            raise ValueError("dual_clip: expected 0 (off) or a number above 1")
        return self


class AlgorithmSettings(_Settings):
    second_attempt: SecondAttempt = SecondAttempt.REFLECTION
    memory_strategy: RetrievalStrategy = RetrievalStrategy.LATEST_SUCCESS
    memory_entries: int = Field(1, ge=0, le=100)
    memory_scope: str | None = None
    success_threshold: float = 1.0
    distillation_loss: DistillationLoss = DistillationLoss.RAFT
    distillation_weight: float = Field(1.0, ge=0)
    distillation_baseline: bool = False
    first_weight: float = Field(1.0, ge=0)
    reflection_weight: float = Field(1.0, ge=0)
    second_weight: float = Field(1.0, ge=0)
    normalize_by_std: bool = True
    optimizer_steps: int = Field(1, ge=1, le=1000)
    branch_normalization: BranchNormalization = BranchNormalization.OWN_COUNT
    train_cut_reflections: bool = False


class RolloutSettings(_Settings):
    tasks_per_step: int = Field(64, ge=1)
    rollouts_per_task: int = Field(4, ge=1)
    temperature: float = Field(0.7, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    max_tokens: int = Field(1024, ge=1)
    reflection_temperature: float = Field(0.5, gt=0)
    reflection_top_p: float = Field(0.9, gt=0, le=1)
    reflection_max_tokens: int = Field(1024, ge=1)
    concurrency: int = Field(256, ge=1)
    max_restarts: int = Field(3, ge=0)
    train_tasks: int = Field(0, ge=0)


class EvaluationSettings(_Settings):
    every: int = Field(5, ge=0)
    tasks: int = Field(0, ge=0)
    samples: int = Field(4, ge=1)
    temperature: float = Field(0.7, ge=0)
    top_p: float = Field(0.8, gt=0, le=1)
    top_k: int = Field(20, ge=0)


class PoliciesSettings(_Settings):
    actor: str = Field("", pattern=_POLICY_NAME)
    reflector: str = Field("", pattern=_POLICY_NAME)

    @model_validator(mode="after")
    def _reflector_is_another(self) -> Self:
        if self.reflector and self.reflector == self.actor:
            raise ValueError("reflector: expected another policy than the actor, or nothing: then the actor reflects")
        return self


class RunSettings(_Settings):
    environment: str = Field(min_length=1)
    model: TrainedModelSettings = TrainedModelSettings()
    algorithm: AlgorithmSettings = AlgorithmSettings()
    rollout: RolloutSettings = RolloutSettings()
    loss: LossSettings = LossSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    steps: int = Field(100, ge=1)
    seed: int = Field(0, ge=0)
    deterministic: bool = False
    checkpoint_every: int = Field(10, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    policies: PoliciesSettings = PoliciesSettings()

    @model_validator(mode="after")
    def _deterministic_is_one_at_a_time(self) -> Self:
        if self.deterministic and self.rollout.concurrency != 1:
            rollout = self.rollout.model_copy(update={"concurrency": 1})
            object.__setattr__(self, "rollout", rollout)
        return self
