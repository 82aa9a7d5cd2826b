"""Every setting of a training run, with the paper's defaults (arXiv 2602.13949). Mirrors `RunConfig` of
`mulligan.trainer.v1`, field by field; the comments there say what each means."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, SerializeAsAny, model_validator

from mulligan.common.number_settings import NumberSettings
from mulligan.common.plugins import Plugins, PluginSettings, located, read_chosen, read_named
from mulligan.common.suggest import did_you_mean
from mulligan.trainer.advantages import ADVANTAGES
from mulligan.trainer.aggregation import Aggregation
from mulligan.trainer.loss_settings import LossSettings
from mulligan.trainer.losses import read_loss
from mulligan.trainer.memory_settings import MemoryUseSettings
from mulligan.trainer.protocols import MOST_PROTOCOLS, MOST_SAMPLES, PROTOCOLS, ProtocolSettings
from mulligan.trainer.samplers import SAMPLERS, SamplerSettings

__all__ = [
    "ALGORITHMS",
    "BY_SECOND_ATTEMPT",
    "COMMON_SETTINGS",
    "AlgorithmSettings",
    "EvaluationSettings",
    "LearnerKind",
    "LoraSettings",
    "LossSettings",
    "OptimizerSettings",
    "PoliciesSettings",
    "RolloutSettings",
    "RunSettings",
    "TrackingSettings",
    "TrainedModelSettings",
]

MOST_ROLLOUTS = 65_536  # of all steps that are sampled at once
_MOST_WRITERS = 64
_MOST_MODULES = 4096  # more than the layers of any model
_POLICY_NAME = r"^([A-Za-z0-9][A-Za-z0-9._-]{0,63})?$"


class _Settings(NumberSettings):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LearnerKind(StrEnum):
    SERVICE = "service"
    NONE = "none"


class LoraSettings(_Settings):
    rank: int = Field(ge=1, le=1024)
    alpha: float | None = Field(None, gt=0)
    target_modules: tuple[str, ...] = Field((), max_length=_MOST_MODULES)


class TrainedModelSettings(_Settings):
    source: str = "embedded"
    revision: str = Field("", max_length=200)
    lora: LoraSettings | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"


class OptimizerSettings(_Settings):
    learning_rate: float = Field(1e-6, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    warmup_steps: int = Field(0, ge=0)
    max_skipped_steps: int = Field(5, ge=0)
    moments: Literal["float32", "8bit"] = "float32"


class AlgorithmSettings(MemoryUseSettings):
    """What every algorithm has. An algorithm's own `Settings` add to it, and may give other defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    success_threshold: float = 1.0
    optimizer_steps: int = Field(1, ge=1, le=1000)
    recompute_log_probs: bool = True
    normalize_by_std: bool = True
    advantage: str = ADVANTAGES.default
    advantage_settings: dict[str, Any] = Field(default_factory=dict)
    aggregation: Aggregation = Aggregation.SEQUENCE_MEAN_TOKEN_SUM
    aggregation_constant: float = Field(1.0, gt=0)
    train_cut_reflections: bool = False

    @model_validator(mode="after")
    def _advantage_is_usable(self) -> Self:
        at = ("advantage_settings",)
        read_chosen(ADVANTAGES, self.advantage, self.estimator_settings, name_at="advantage", at=at)
        return self

    @property
    def without_effect(self) -> frozenset[str]:
        """The settings that mean nothing to the algorithm, or nothing with the others: of this table by their names, of
        the table `[loss]` as `loss.NAME`. Without `loss.name`, the loss's own settings mean nothing either. What is
        given of them all the same is told in a notice."""
        return frozenset()

    @property
    def estimator_settings(self) -> dict[str, Any]:
        """Those of the advantage estimator. `normalize_by_std` is GRPO's."""
        own = {"normalize_by_std": self.normalize_by_std} if self.advantage == ADVANTAGES.default else {}
        return own | self.advantage_settings


ALGORITHMS = Plugins(
    noun="algorithm",
    package="mulligan.trainer.algorithms",
    group="mulligan.algorithms",
    exports=("Settings", "play", "train"),
    default="erl",
    settings=AlgorithmSettings,
    reserved=("settings", "second_attempt"),  # fields of `AlgorithmConfig` with a meaning of their own
)
# Before algorithms had names, this setting told them apart, and all of them had ERL's settings.
BY_SECOND_ATTEMPT = {"reflection": "erl", "none": "rlvr", "raw_retry": "raw_retry", "try_again": "try_again"}


def _algorithm(table: Any) -> AlgorithmSettings:
    if isinstance(table, Mapping) and (table.get("second_attempt") or "name" not in table):
        table = _named(table)
    found: AlgorithmSettings = read_named(ALGORITHMS, table, ALGORITHMS.default)
    return found


def _named(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table with `name` in place of `second_attempt`. Without a name, ERL's settings that the algorithm has not are
    left out: they had no meaning for it."""
    old = str(table.get("second_attempt") or "reflection")
    if old not in BY_SECOND_ATTEMPT:
        near = did_you_mean(old, BY_SECOND_ATTEMPT)
        raise located({("second_attempt",): f"expected {', '.join(BY_SECOND_ATTEMPT)}; got {old!r}{near}"})
    name = table.get("name", BY_SECOND_ATTEMPT[old])
    if BY_SECOND_ATTEMPT[old] != name and "second_attempt" in table:
        raise located({("second_attempt",): f"{old!r} and name = {name!r} are two algorithms; expected one of the two"})
    own = ALGORITHMS.find(name).Settings.model_fields
    others = ALGORITHMS.find(ALGORITHMS.default).Settings.model_fields.keys() - own.keys()
    dropped = {"second_attempt", *(others if "name" not in table else ())}
    return {"name": name} | {field: value for field, value in table.items() if field not in dropped}


def _sampler(table: Any) -> SamplerSettings:
    found: SamplerSettings = read_named(SAMPLERS, table, SAMPLERS.default)
    return found


class RolloutSettings(_Settings):
    tasks_per_step: int = Field(64, ge=1, le=MOST_ROLLOUTS)
    rollouts_per_task: int = Field(4, ge=1, le=4096)  # each looks at those beside it
    temperature: float = Field(0.7, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    max_tokens: int = Field(1024, ge=1)
    reflection_temperature: float = Field(0.5, gt=0)
    reflection_top_p: float = Field(0.9, gt=0, le=1)
    reflection_max_tokens: int = Field(1024, ge=1)
    concurrency: int = Field(256, ge=1, le=MOST_ROLLOUTS)
    max_restarts: int = Field(3, ge=0)
    train_tasks: int = Field(0, ge=0)
    replace_rounds: int = Field(0, ge=0, le=100)
    max_staleness: int = Field(0, ge=0, le=100)

    @property
    def begun_at_once(self) -> int:
        """How many of what waits for slots are begun: for each slot one that has it, and one that takes it next, before
        what waits with a lower priority."""
        return 2 * self.concurrency

    @model_validator(mode="after")
    def _what_is_sampled_at_once_is_bounded(self) -> Self:
        steps = self.max_staleness + 1
        if self.tasks_per_step * self.rollouts_per_task * steps > MOST_ROLLOUTS:
            fitting = MOST_ROLLOUTS // (self.rollouts_per_task * steps)
            if fitting:
                several = f" and max_staleness = {self.max_staleness}" if self.max_staleness else ""
                field, given = "tasks_per_step", f"rollouts_per_task = {self.rollouts_per_task}{several}"
            else:  # too many for a single task
                fitting = MOST_ROLLOUTS // steps
                field, given = "rollouts_per_task", f"max_staleness = {self.max_staleness}, at one task per step"
            problem = (
                f"expected at most {fitting} with {given}: {MOST_ROLLOUTS} rollouts are sampled at once at most; "
                f"got {getattr(self, field)}"
            )
            raise located({(field,): problem})
        return self

    @model_validator(mode="after")
    def _signal_needs_a_group(self) -> Self:
        if self.replace_rounds and self.rollouts_per_task == 1:
            problem = "expected 0, as a group of one (rollouts_per_task = 1) compares nothing"
            raise located({("replace_rounds",): problem})
        return self


def _protocol(table: Any) -> ProtocolSettings:
    found: ProtocolSettings = read_named(PROTOCOLS, table)
    return found


class EvaluationSettings(_Settings):
    every: int = Field(5, ge=0)
    tasks: int = Field(0, ge=0)
    samples: int = Field(4, ge=1, le=MOST_SAMPLES)
    temperature: float = Field(0.7, ge=0)
    top_p: float = Field(0.8, gt=0, le=1)
    top_k: int = Field(20, ge=0)
    protocols: tuple[Annotated[SerializeAsAny[ProtocolSettings], BeforeValidator(_protocol)], ...] = Field(
        (), max_length=MOST_PROTOCOLS
    )

    @model_validator(mode="after")
    def _protocols_are_told_apart(self) -> Self:
        labels = [protocol.prefix for protocol in self.protocols]
        for index, label in enumerate(labels):
            if label in labels[:index]:
                raise located({(f"protocols[{index}]", "label"): f"{label!r} is there twice; expected another label"})
        return self


class PoliciesSettings(_Settings):
    actor: str = Field("", pattern=_POLICY_NAME)
    reflector: str = Field("", pattern=_POLICY_NAME)
    judge: str = Field("", pattern=_POLICY_NAME)
    evaluator: str = Field("", pattern=_POLICY_NAME)

    @model_validator(mode="after")
    def _speakers_are_others(self) -> Self:
        for name, verb in (("reflector", "reflects"), ("judge", "judges")):
            speaker = getattr(self, name)
            if speaker and speaker == self.actor:
                problem = f"expected another policy than the actor, or nothing: then the actor {verb}"
                raise located({(name,): problem})
        if self.evaluator and self.evaluator == self.actor:
            problem = "expected another policy than the actor, or nothing: then training waits for evaluations"
            raise located({("evaluator",): problem})
        return self


class TrackingSettings(_Settings):
    """Which metric writers are there is asked when a run starts: a run can be read where they are not installed."""

    writers: tuple[str, ...] = Field((), max_length=_MOST_WRITERS)
    project: str = Field("mulligan", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")

    @model_validator(mode="after")
    def _writers_are_told_apart(self) -> Self:
        for index, name in enumerate(self.writers):
            if name in self.writers[:index]:
                raise located({(f"writers[{index}]",): f"{name!r} is there twice; expected each writer once"})
        return self


# The tables whose `name` chooses a plug-in, and what all plug-ins of the kind have.
COMMON_SETTINGS: dict[str, type[PluginSettings]] = {
    "algorithm": AlgorithmSettings,
    "sampler": SamplerSettings,
    "loss": LossSettings,
}


class RunSettings(_Settings):
    environment: str = Field(min_length=1)
    model: TrainedModelSettings = TrainedModelSettings()
    algorithm: Annotated[SerializeAsAny[AlgorithmSettings], BeforeValidator(_algorithm)] = Field(
        default_factory=lambda: _algorithm({})
    )
    sampler: Annotated[SerializeAsAny[SamplerSettings], BeforeValidator(_sampler)] = Field(
        default_factory=lambda: _sampler({})
    )
    rollout: RolloutSettings = RolloutSettings()
    loss: Annotated[SerializeAsAny[LossSettings], BeforeValidator(read_loss)] = Field(
        default_factory=lambda: read_loss({})
    )
    optimizer: OptimizerSettings = OptimizerSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    steps: int = Field(100, ge=1)
    seed: int = Field(0, ge=0)
    deterministic: bool = False
    checkpoint_every: int = Field(10, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    policies: PoliciesSettings = PoliciesSettings()
    learner: LearnerKind = LearnerKind.SERVICE
    tracking: TrackingSettings = TrackingSettings()

    @property
    def environments(self) -> dict[str, str]:
        """All environments of the run, each with the setting that names it; its own comes first."""
        return {self.environment: "environment"} | {
            name: field for name, field in self.sampler.environments.items() if name != self.environment
        }

    @property
    def trains(self) -> bool:
        """Whether weights change. Otherwise the memory alone learns."""
        return self.learner is LearnerKind.SERVICE

    @property
    def holdout(self) -> float:
        """The share of a group's rollouts from which an entry of the memory is left out; 0: nothing is drawn."""
        return 0.0 if self.deterministic else self.algorithm.holdout

    @model_validator(mode="after")
    def _without_a_learner_no_weights_change(self) -> Self:
        if self.trains:
            return self
        if self.policies.evaluator:
            problem = 'expected nothing with learner = "none": it would be given weights, and none are learned'
            raise located({("policies", "evaluator"): problem})
        if self.model.lora is not None:
            raise located({("model", "lora"): 'expected nothing with learner = "none": no weights are learned'})
        return self

    @model_validator(mode="after")
    def _deterministic_is_one_at_a_time(self) -> Self:
        if self.deterministic and self.rollout.max_staleness:
            problem = "expected 0, as a deterministic run samples and learns in turns; or deterministic = false"
            raise located({("rollout", "max_staleness"): problem})
        if self.deterministic and self.policies.evaluator:
            problem = "expected nothing, as a deterministic run does one thing at a time; or deterministic = false"
            raise located({("policies", "evaluator"): problem})
        if self.deterministic and self.algorithm.memory_holdout:
            problem = "expected 0, as a deterministic run shows every entry that it retrieves; or deterministic = false"
            raise located({("algorithm", "memory_holdout"): problem})
        if self.deterministic and self.rollout.concurrency != 1:
            rollout = self.rollout.model_copy(update={"concurrency": 1})
            object.__setattr__(self, "rollout", rollout)
        return self
