"""Protobuf ↔ data and settings of a learner, for its servicer and its client."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from pydantic import ValidationError

from mulligan.common.errors import invalid_field
from mulligan.trainer.data import Datum, Distillation, PolicyGradient
from mulligan.trainer.learner.settings import LearnerInfo, LearnerSpec
from mulligan.trainer.settings import LossSettings, OptimizerSettings, TrainedModelSettings
from mulligan.trainer.v1 import learner_service_pb2 as pb
from mulligan.trainer.wire import Settings, fill_proto, plain_from_proto


def data_to_proto(data: Iterable[Datum]) -> list[pb.Datum]:
    return [_datum_to_proto(datum) for datum in data]


def _datum_to_proto(datum: Datum) -> pb.Datum:
    message = pb.Datum(
        datum_id=datum.datum_id,
        token_ids=datum.token_ids,
        loss_mask=datum.loss_mask,
        weight=datum.weight,
        temperature=datum.temperature,
        branch=datum.branch,
    )
    if isinstance(datum.objective, PolicyGradient):
        objective = message.policy_gradient
        objective.SetInParent()
        objective.advantage = datum.objective.advantage
        objective.rollout_log_probs.extend(datum.objective.rollout_log_probs)
        objective.old_log_probs.extend(datum.objective.old_log_probs)
    else:
        message.distillation.SetInParent()
        message.distillation.target_weight = datum.objective.target_weight
    return message


def data_from_proto(data: Iterable[pb.Datum]) -> list[Datum]:
    """Raises INVALID_FIELD for a datum without objective. The learner checks the rest."""
    return [
        Datum(
            datum_id=message.datum_id,
            token_ids=tuple(message.token_ids),
            loss_mask=tuple(message.loss_mask),
            weight=message.weight,
            temperature=message.temperature,
            objective=_objective_from_proto(index, message),
            branch=message.branch,
        )
        for index, message in enumerate(data)
    ]


def _objective_from_proto(index: int, message: pb.Datum) -> PolicyGradient | Distillation:
    match message.WhichOneof("objective"):
        case "policy_gradient":
            objective = message.policy_gradient
            return PolicyGradient(
                objective.advantage, tuple(objective.rollout_log_probs), tuple(objective.old_log_probs)
            )
        case "distillation":
            return Distillation(message.distillation.target_weight)
    raise invalid_field(f"data[{index}].objective", "policy_gradient or distillation")


def loss_to_proto(loss: LossSettings) -> pb.LossConfig:
    message = pb.LossConfig()
    fill_proto(message, loss.model_dump(mode="json"))
    return message


def loss_from_proto(message: pb.LossConfig) -> LossSettings:
    return _settings(LossSettings, "loss", message)


def model_to_proto(model: TrainedModelSettings) -> pb.ModelConfig:
    message = pb.ModelConfig()
    fill_proto(message, model.model_dump(mode="json"))
    return message


def spec_to_proto(spec: LearnerSpec, request: pb.CreateLearnerRequest) -> None:
    request.model.CopyFrom(model_to_proto(spec.model))
    fill_proto(request.optimizer, spec.optimizer.model_dump(mode="json"))
    request.seed = spec.seed
    request.deterministic = spec.deterministic
    request.keep_checkpoints = spec.keep_checkpoints


def spec_from_proto(request: pb.CreateLearnerRequest) -> LearnerSpec:
    return LearnerSpec(
        model=_settings(TrainedModelSettings, "model", request.model),
        optimizer=_settings(OptimizerSettings, "optimizer", request.optimizer),
        seed=request.seed,
        deterministic=request.deterministic,
        keep_checkpoints=request.keep_checkpoints,
    )


def lease_from_proto(request: pb.CreateLearnerRequest) -> float | None:
    """In seconds; None without lease."""
    return _seconds(request.lease) if request.HasField("lease") else None


def info_from_proto(message: pb.LearnerInfo) -> LearnerInfo:
    return LearnerInfo(
        learner_id=message.learner_id,
        owner=message.owner,
        model=message.model.source,
        optimizer_steps=message.optimizer_steps,
        idle=_seconds(message.idle),
        lease_left=_seconds(message.lease_left) if message.HasField("lease_left") else None,
    )


def _seconds(message: Duration) -> float:
    return message.seconds + message.nanos / 1e9


def duration(seconds: float) -> Duration:
    message = Duration()
    message.FromNanoseconds(round(seconds * 1e9))
    return message


def _settings(kind: type[Settings], name: str, message: Message) -> Settings:
    """Fills in the defaults. Raises INVALID_FIELD, naming the field."""
    try:
        return kind.model_validate(plain_from_proto(message))
    except ValidationError as error:
        first = error.errors()[0]
        raise invalid_field(".".join([name, *map(str, first["loc"])]), first["msg"]) from None
