"""Protobuf ↔ run settings and run events. Settings are converted field by field through their names, which both sides
share; enum values are the proto's without their prefix, in lower case."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, EncodeError, Message
from google.protobuf.struct_pb2 import ListValue, Struct, Value
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
# What a field raises for a value of another type or size.
_OF_ANOTHER_TYPE = (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError)
_EXACT = 2**53  # a Struct's numbers are doubles: these hold whole numbers up to here


class _DoesNotFit(ValueError):
    """The message says why. `place` is the setting, with the tables that it is in."""

    def __init__(self, place: tuple[str, ...], problem: str):
        super().__init__(problem)
        self.place = place


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
    """Raises INVALID_SETTING for one that the contract does not hold, such as a number of 400 digits."""
    config = run_config_pb2.RunConfig()
    fill_with(config, settings)
    for old, name in BY_SECOND_ATTEMPT.items():  # for clients from before algorithms had names
        if name == settings.algorithm.name:
            fill_proto(config.algorithm, {"second_attempt": old})
    return config


def stored_to_proto(plain: Mapping[str, Any]) -> run_config_pb2.RunConfig:
    """Settings as a run's folder has them, where a plug-in that they name cannot be asked to read them. Raises
    INVALID_SETTING where they are none, or none that a client can read."""
    config = run_config_pb2.RunConfig()
    fill_proto(config, {name: value for name, value in plain.items() if name in config.DESCRIPTOR.fields_by_name})
    try:
        sent = run_config_pb2.RunConfig.FromString(config.SerializeToString())
    except (DecodeError, EncodeError) as error:  # tables in tables without end
        raise DomainError(Reason.INVALID_SETTING, f"settings: {error}", field="settings") from None
    foreign_from_proto(sent)
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


def fill_with(message: Message, settings: BaseModel) -> None:
    """Fills in all settings."""
    fill_proto(message, settings.model_dump(mode="json"))
    _fill_in_unsent(message, settings)


def fill_proto(message: Message, plain: Mapping[str, Any]) -> None:
    """Fills in the fields by their names. Where the message has `settings`, these take what has no field, and what
    does not fit into the field of its name, such as a text where it has a number: a plug-in chooses its own types.
    Raises INVALID_SETTING, naming the setting, for what fits nowhere."""
    try:
        _fill_in(message, plain)
    except _DoesNotFit as error:
        field = ".".join(error.place)
        raise DomainError(Reason.INVALID_SETTING, f"{field}: {error}", field=field) from None


def _fill_in(message: Message, plain: Mapping[str, Any]) -> None:
    takes_others = _takes_others(message)
    for name, value in plain.items():
        if value is None:
            continue
        field = message.DESCRIPTOR.fields_by_name.get(name)
        try:
            if not takes_others:
                _fill(message, message.DESCRIPTOR.fields_by_name[name], value)
            elif field is None or not _fits(message, field, value):
                getattr(message, "settings")[name] = _in_struct(value)  # noqa: B009 - no type has it
        except _DoesNotFit as error:
            raise _DoesNotFit((name, *error.place), str(error)) from None
        except KeyError:
            raise _DoesNotFit((name,), "no such setting") from None
        except _OF_ANOTHER_TYPE as error:
            raise _DoesNotFit((name,), f"the contract does not hold this value: {error}") from None


def _fill_in_unsent(message: Message, settings: BaseModel) -> None:
    """Puts into `settings` what a field does not tell apart from nothing, such as None and an empty list, where that is
    not the plug-in's default."""
    fields = message.DESCRIPTOR.fields_by_name
    sent = {field.name for field, _ in message.ListFields()}
    for name, info in type(settings).model_fields.items():
        value = getattr(settings, name)
        if name in sent and fields[name].message_type is not None:
            nested, values = getattr(message, name), value
            if not fields[name].is_repeated:
                nested, values = [nested], [value]
            for one, inner in zip(nested, values, strict=True):
                if isinstance(inner, BaseModel):
                    _fill_in_unsent(one, inner)
        elif _takes_others(message) and name not in sent and value != info.get_default(call_default_factory=True):
            others = getattr(message, "settings")  # noqa: B009 - no type has it
            if name not in others:
                others[name] = _in_struct(settings.model_dump(mode="json", include={name})[name])


def _fits(message: Message, field: Any, value: Any) -> bool:
    """Whether the field takes the value and gives it back as it is. If not, it is left empty."""
    try:
        _fill(message, field, value)
        found = _plain(field, getattr(message, field.name), (field.name,))
        if _is_struct(field) or (found == value and isinstance(found, bool) == isinstance(value, bool)):
            return True
    except _OF_ANOTHER_TYPE:
        pass
    message.ClearField(field.name)
    return False


def _fill(message: Message, field: Any, value: Any) -> None:
    name = field.name
    if _is_struct(field):
        getattr(message, name).update(_in_struct(value))
    elif isinstance(value, Mapping):
        getattr(message, name).SetInParent()
        _fill_in(getattr(message, name), value)
    elif isinstance(value, list | tuple) and field.message_type is not None:
        for one in value:
            _fill_in(getattr(message, name).add(), one)
    elif isinstance(value, list | tuple):
        getattr(message, name).extend(value)
    elif field.enum_type is not None:
        setattr(message, name, field.enum_type.values_by_name[_prefix(field) + str(value).upper()].number)
    else:
        setattr(message, name, value)


def _in_struct(value: Any) -> Any:
    """The value as a Struct takes it. Whole numbers that it would round are texts, which settings read as numbers."""
    if isinstance(value, Mapping):
        return {name: _in_struct(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_in_struct(one) for one in value]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > _EXACT:
        return str(value)
    return value


def _of_struct(value: Struct | ListValue | Value, at: tuple[str, ...]) -> Any:
    """The plain value. Whole numbers are int, as somebody wrote them. Raises ValidationError for one that is not
    finite."""
    if isinstance(value, Struct):
        return {name: _of_struct(one, (*at, name)) for name, one in value.fields.items()}
    if isinstance(value, ListValue):
        *within, name = at
        return [_of_struct(one, (*within, f"{name}[{place}]")) for place, one in enumerate(value.values)]
    kind = value.WhichOneof("kind")
    if kind in ("struct_value", "list_value"):
        return _of_struct(getattr(value, kind), at)
    if kind != "number_value":
        return getattr(value, kind) if kind in ("string_value", "bool_value") else None
    number = value.number_value
    if not math.isfinite(number):
        raise located({at: "expected a finite number"})
    return int(number) if number.is_integer() and abs(number) <= _EXACT else number


def _is_struct(field: Any) -> bool:
    return field.message_type is not None and bool(field.message_type.full_name == _STRUCT)


def _takes_others(message: Message) -> bool:
    field = message.DESCRIPTOR.fields_by_name.get("settings")
    return field is not None and _is_struct(field)


def _plain(field: Any, value: Any, at: tuple[str, ...]) -> Any:
    if _is_struct(field):
        return _of_struct(value, at[:-1] if at[-1:] == ("settings",) else at)
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


def entry_to_proto(entry: Entry, *, looks_on: bool = False) -> run_service_pb2.RunEvent:
    """`looks_on`: for a caller who is not told what other code said."""
    message = run_service_pb2.RunEvent(number=entry.number, time=timestamp(entry.time))
    match entry.event:
        case StepEvent(step, metrics):
            message.step_completed.CopyFrom(run_service_pb2.StepCompleted(step=step, metrics=metrics))
        case EvaluationEvent():
            message.evaluation_completed.CopyFrom(evaluation_to_proto(entry.event))
        case StateEvent(state, error, told):
            said = told if looks_on and told else error
            message.state_changed.CopyFrom(run_service_pb2.StateChanged(state=state_to_proto(state), error=said))
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
