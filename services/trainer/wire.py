"""Protobuf ↔ run settings and run events. Settings are converted field by field through their names, which both sides
share; enum values are the proto's without their prefix, in lower case."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any, TypeVar

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import BaseModel, ValidationError

from mulligan.common.errors import DomainError, Reason
from mulligan.common.plugins import located
from mulligan.common.suggest import problems
from mulligan.trainer.events import Entry, EvaluationEvent, NoticeEvent, StateEvent, StepEvent
from mulligan.trainer.folder import RunState
from mulligan.trainer.settings import BY_SECOND_ATTEMPT, COMMON_SETTINGS, RunSettings
from mulligan.trainer.v1 import run_config_pb2, run_service_pb2

Settings = TypeVar("Settings", bound=BaseModel)
_STRUCT = "google.protobuf.Struct"


def settings_from_proto(config: run_config_pb2.RunConfig) -> RunSettings:
    """Fills in the defaults. Raises INVALID_SETTING, naming the setting."""
    return validated(RunSettings, config)


def validated(model: type[Settings], given: Mapping[str, Any] | Message) -> Settings:
    """Raises INVALID_SETTING, naming the setting."""
    try:
        return model.model_validate(plain_from_proto(given) if isinstance(given, Message) else given)
    except ValidationError as error:
        field, said = next(iter(problems(error, model).items()))
        raise DomainError(Reason.INVALID_SETTING, f"{field}: {said}", field=field) from None


def settings_to_proto(settings: RunSettings) -> run_config_pb2.RunConfig:
    config = run_config_pb2.RunConfig()
    fill_proto(config, settings.model_dump(mode="json"))
    for old, name in BY_SECOND_ATTEMPT.items():  # for clients from before algorithms had names
        if name == settings.algorithm.name:
            fill_proto(config.algorithm, {"second_attempt": old})
    return config


def stored_to_proto(plain: Mapping[str, Any]) -> run_config_pb2.RunConfig:
    """Settings as a run's folder has them, where a plug-in that they name cannot be asked to read them."""
    config = run_config_pb2.RunConfig()
    fill_proto(config, {name: value for name, value in plain.items() if name in config.DESCRIPTOR.fields_by_name})
    return config


def foreign_from_proto(config: run_config_pb2.RunConfig) -> RunSettings:
    """Settings of a run elsewhere. Plug-ins that are not installed here do not read theirs: of these there are the
    common ones, without those of an advantage estimator. Raises INVALID_SETTING, naming the setting."""
    try:
        return settings_from_proto(config)
    except DomainError as refused:
        try:
            plain = plain_from_proto(config)
        except ValidationError:
            raise refused from None
        for table, common in COMMON_SETTINGS.items():
            given = plain.get(table, {})
            if "name" in given:  # without, it is the default one's, which is installed
                known = {name: value for name, value in given.items() if not name.startswith("advantage")}
                plain[table] = common.model_construct(**known)
        plain.get("evaluation", {}).pop("protocols", None)
        return validated(RunSettings, plain)


def plain_from_proto(message: Message, at: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields that are present, as plain values. What a plug-in's `settings` hold stands beside the other fields.
    `at` is where the message stands in the whole. Raises ValidationError for a setting that is in both."""
    plain = {field.name: _plain(field, value, (*at, field.name)) for field, value in message.ListFields()}
    if not _takes_others(message):
        return plain
    others: dict[str, Any] = plain.pop("settings", {})
    if twice := [name for name in others if name in plain]:
        raise located({(*at, name): "expected a field or an entry of `settings`; got both" for name in twice})
    return plain | others


def fill_proto(message: Message, plain: Mapping[str, Any]) -> None:
    """Fills in the fields by their names. Names without a field go into `settings`, where the message has that."""
    known = message.DESCRIPTOR.fields_by_name
    for name, value in plain.items():
        if value is None:
            continue
        if name not in known and _takes_others(message):
            getattr(message, "settings")[name] = value  # noqa: B009 - no type has it
            continue
        field = known[name]
        if field.message_type is not None and field.message_type.full_name == _STRUCT:
            getattr(message, name).update(value)
        elif isinstance(value, Mapping):
            getattr(message, name).SetInParent()
            fill_proto(getattr(message, name), value)
        elif isinstance(value, list | tuple) and field.message_type is not None:
            for one in value:
                fill_proto(getattr(message, name).add(), one)
        elif isinstance(value, list | tuple):
            getattr(message, name).extend(value)
        elif field.enum_type is not None:
            setattr(message, name, field.enum_type.values_by_name[_prefix(field) + str(value).upper()].number)
        else:
            setattr(message, name, value)


def _takes_others(message: Message) -> bool:
    field = message.DESCRIPTOR.fields_by_name.get("settings")
    return field is not None and field.message_type is not None and field.message_type.full_name == _STRUCT


def _plain(field: Any, value: Any, at: tuple[str, ...]) -> Any:
    if field.message_type is not None and field.message_type.full_name == _STRUCT:
        return MessageToDict(value)
    if field.message_type is not None:
        if not field.is_repeated:
            return plain_from_proto(value, at)
        *within, name = at
        return [plain_from_proto(one, (*within, f"{name}[{place}]")) for place, one in enumerate(value)]
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return known.name.removeprefix(_prefix(field)).lower() if known else value
    return list(value) if field.is_repeated else value


def _prefix(field: Any) -> str:
    assert field.enum_type is not None
    return re.sub(r"(?<!^)(?=[A-Z])", "_", field.enum_type.name).upper() + "_"


def timestamp(time: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(time)
    return message


def state_to_proto(state: str) -> run_service_pb2.RunState.ValueType:
    return run_service_pb2.RunState.Value(f"RUN_STATE_{state.upper()}")


def state_from_proto(state: run_service_pb2.RunState.ValueType) -> RunState:
    return RunState(run_service_pb2.RunState.Name(state).removeprefix("RUN_STATE_").lower())


def evaluation_to_proto(event: EvaluationEvent) -> run_service_pb2.EvaluationCompleted:
    return run_service_pb2.EvaluationCompleted(
        step=event.step,
        success=event.success,
        mean_reward=event.mean_reward,
        attempts=event.attempts,
        excluded=event.excluded,
        metrics=event.metrics,
        environment=event.environment,
    )


def evaluation_from_proto(message: run_service_pb2.EvaluationCompleted) -> EvaluationEvent:
    return EvaluationEvent(
        step=message.step,
        success=message.success,
        mean_reward=message.mean_reward,
        attempts=message.attempts,
        excluded=message.excluded,
        environment=message.environment,
        metrics=dict(message.metrics),
    )


def entry_to_proto(entry: Entry) -> run_service_pb2.RunEvent:
    message = run_service_pb2.RunEvent(number=entry.number, time=timestamp(entry.time))
    match entry.event:
        case StepEvent(step, metrics):
            message.step_completed.CopyFrom(run_service_pb2.StepCompleted(step=step, metrics=metrics))
        case EvaluationEvent():
            message.evaluation_completed.CopyFrom(evaluation_to_proto(entry.event))
        case StateEvent(state, error):
            message.state_changed.CopyFrom(run_service_pb2.StateChanged(state=state_to_proto(state), error=error))
        case NoticeEvent(text):
            message.notice.CopyFrom(run_service_pb2.Notice(text=text))
    return message


def entry_from_proto(message: run_service_pb2.RunEvent) -> Entry:
    event: StepEvent | EvaluationEvent | StateEvent | NoticeEvent
    match message.WhichOneof("event"):
        case "step_completed":
            event = StepEvent(message.step_completed.step, dict(message.step_completed.metrics))
        case "evaluation_completed":
            event = evaluation_from_proto(message.evaluation_completed)
        case "state_changed":
            event = StateEvent(state_from_proto(message.state_changed.state), message.state_changed.error)
        case _:
            event = NoticeEvent(message.notice.text)
    return Entry(message.number, message.time.ToDatetime(), event)
