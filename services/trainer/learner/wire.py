"""Protobuf ↔ data and settings of a learner, for its servicer and its client."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from pydantic import ValidationError

from mulligan.common.errors import invalid_field
from mulligan.common.extras import MissingExtra
from mulligan.common.plugins import UnusablePlugin
from mulligan.common.suggest import did_you_mean
from mulligan.trainer.data import PARTS, TYPED, Datum, Distillation, PolicyGradient
from mulligan.trainer.learner.settings import LearnerInfo, LearnerSpec
from mulligan.trainer.losses import read_loss
from mulligan.trainer.objective import InputKind, Objective, Tokens, inputs, inputs_of
from mulligan.trainer.objectives import name_of, named
from mulligan.trainer.settings import LossSettings, OptimizerSettings, TrainedModelSettings
from mulligan.trainer.v1 import learner_service_pb2 as pb
from mulligan.trainer.wire import Settings, fill_with, plain_from_proto


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
    if isinstance(datum.objective, TYPED):
        _fill_typed(getattr(message, name_of(type(datum.objective))), datum.objective)
    else:
        _fill_custom(message.custom, datum.objective)
    return message


def _fill_typed(message: Any, objective: Objective) -> None:
    """Inputs are fields of the same names."""
    message.SetInParent()
    for name, value in inputs_of(objective, InputKind.NUMBER).items():
        setattr(message, name, value)
    for name, values in inputs_of(objective, InputKind.TOKEN_VALUES).items():
        getattr(message, name).extend(values)


def _fill_custom(message: pb.Objective, objective: Objective) -> None:
    message.name = name_of(type(objective))
    message.numbers.update(inputs_of(objective, InputKind.NUMBER))
    for name, values in inputs_of(objective, InputKind.TOKEN_VALUES).items():
        if values:
            message.token_values[name].values.extend(values)
    for name, tokens in inputs_of(objective, InputKind.TOKENS).items():
        other = pb.OtherSequence(token_ids=tokens.token_ids, loss_mask=tokens.loss_mask, log_probs=tokens.log_probs)
        message.sequences[name].CopyFrom(other)


def data_from_proto(data: Iterable[pb.Datum]) -> list[Datum]:
    """Raises INVALID_FIELD for a datum without objective, or with inputs that are not its objective's. The learner
    checks the rest."""
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


def _objective_from_proto(index: int, message: pb.Datum) -> Objective:
    match message.WhichOneof("objective"):
        case "policy_gradient":
            return _typed(PolicyGradient, message.policy_gradient)
        case "distillation":
            return _typed(Distillation, message.distillation)
        case "custom":
            return _custom(f"data[{index}].custom", message.custom)
    raise invalid_field(f"data[{index}].objective", "policy_gradient, distillation or custom")


def _typed(kind: type[Objective], message: Message) -> Objective:
    values = {one.name: getattr(message, one.name) for one in inputs(kind)}
    return kind(**{name: value if isinstance(value, float) else tuple(value) for name, value in values.items()})


def _custom(place: str, message: pb.Objective) -> Objective:
    """Raises INVALID_FIELD for an unknown objective, and inputs that it does not have or that are missing."""
    try:
        kind = named(message.name)
    except (UnusablePlugin, MissingExtra) as error:
        raise invalid_field(f"{place}.name", f"an objective: {error}") from None
    if kind in TYPED:
        raise invalid_field(f"{place}.name", f"another objective: {message.name} has a field of its own")
    given: dict[str, dict[str, Any]] = {
        "numbers": dict(message.numbers),
        "token_values": {name: tuple(values.values) for name, values in message.token_values.items()},
        "sequences": {name: _tokens(tokens) for name, tokens in message.sequences.items()},
    }
    for part, values in given.items():
        names = [one.name for one in inputs(kind) if PARTS[one.kind] == part]
        for name in values:
            if name not in names:
                near = did_you_mean(name, names) or f"; it has {', '.join(names) or 'none'}"
                raise invalid_field(f'{place}.{part}["{name[:100]}"]', f"an input of {message.name}{near}")
    found = {name: value for values in given.values() for name, value in values.items()}
    for one in inputs(kind):
        if one.required and one.name not in found:
            raise invalid_field(f'{place}.{PARTS[one.kind]}["{one.name}"]', f"an input: {message.name} needs it")
    return kind(**found)


def _tokens(message: pb.OtherSequence) -> Tokens:
    return Tokens(tuple(message.token_ids), tuple(message.loss_mask), tuple(message.log_probs))


def loss_to_proto(loss: LossSettings) -> pb.LossConfig:
    message = pb.LossConfig()
    fill_with(message, loss)
    return message


def loss_from_proto(message: pb.LossConfig) -> LossSettings:
    return _settings(read_loss, "loss", message)


def model_to_proto(model: TrainedModelSettings) -> pb.ModelConfig:
    message = pb.ModelConfig()
    fill_with(message, model)
    return message


def spec_to_proto(spec: LearnerSpec, request: pb.CreateLearnerRequest) -> None:
    request.model.CopyFrom(model_to_proto(spec.model))
    fill_with(request.optimizer, spec.optimizer)
    request.seed = spec.seed
    request.deterministic = spec.deterministic
    request.keep_checkpoints = spec.keep_checkpoints


def spec_from_proto(request: pb.CreateLearnerRequest) -> LearnerSpec:
    return LearnerSpec(
        model=_settings(TrainedModelSettings.model_validate, "model", request.model),
        optimizer=_settings(OptimizerSettings.model_validate, "optimizer", request.optimizer),
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


def _settings(read: Callable[[Any], Settings], name: str, message: Message) -> Settings:
    """Fills in the defaults. Raises INVALID_FIELD, naming the field."""
    try:
        return read(plain_from_proto(message))
    except ValidationError as error:
        first = error.errors()[0]
        raise invalid_field(".".join([name, *map(str, first["loc"])]), first["msg"].removeprefix("expected ")) from None
