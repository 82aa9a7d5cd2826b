"""Converts between protobuf messages and the types of `services/common/reflections.py`.

What comes from a server is checked; these functions raise ValueError, which names the field.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, TypeVar

from google.protobuf.timestamp_pb2 import Timestamp

from mulligan.common.errors import CallFailed, DomainError
from mulligan.common.numbers import finite, not_negative
from mulligan.common.reflections import (
    Explained,
    Labels,
    MemoryChange,
    MixPart,
    Provenance,
    RecordedUse,
    ReflectionKind,
    ReflectionQuery,
    ReflectionStatus,
    RetrievalStrategy,
    Retrieved,
    StoredReflection,
    Trial,
    Uplift,
    Use,
)
from mulligan.common.status import item_error
from mulligan.memory.v1 import memory_service_pb2 as pb

E = TypeVar("E", bound=StrEnum)
_NUMBERS: dict[StrEnum, Any] = {
    **{kind: pb.ReflectionKind.Value(f"REFLECTION_KIND_{kind.name}") for kind in ReflectionKind},
    **{status: pb.ReflectionStatus.Value(f"REFLECTION_STATUS_{status.name}") for status in ReflectionStatus},
    **{one: pb.RetrievalStrategy.Value(f"RETRIEVAL_STRATEGY_{one.name}") for one in RetrievalStrategy},
}


def number(value: ReflectionKind | ReflectionStatus | RetrievalStrategy) -> Any:
    """Of the value in the contract's enumeration."""
    return _NUMBERS[value]


def named(kind: type[E], given: int, unspecified: E | None = None) -> E:
    """The value of a number of the contract; `unspecified` for 0. Raises ValueError for an unknown number."""
    if given == 0 and unspecified is not None:
        return unspecified
    for value in kind:
        if _NUMBERS[value] == given:
            return value
    raise ValueError(f"{kind.__name__} {given}, which is unknown")


def provenance_to_proto(origin: Provenance) -> pb.Provenance:
    return pb.Provenance(
        run_id=origin.run_id,
        experience_id=origin.experience_id,
        environment=origin.environment,
        task_id=origin.task_id,
        policy_version=origin.policy_version,
        reward_before=origin.reward_before,
        reward_after=origin.reward_after,
        success=origin.success,
    )


def provenance_from_proto(origin: pb.Provenance) -> Provenance:
    finite("provenance.reward_before", [origin.reward_before])
    finite("provenance.reward_after", [origin.reward_after])
    return Provenance(
        run_id=origin.run_id,
        experience_id=origin.experience_id,
        environment=origin.environment,
        task_id=origin.task_id,
        policy_version=origin.policy_version,
        reward_before=origin.reward_before,
        reward_after=origin.reward_after,
        success=origin.success,
    )


def addition_to_proto(
    request_id: str, scope: str, text: str, provenance: Provenance, labels: Labels
) -> pb.AddReflectionRequest:
    return pb.AddReflectionRequest(
        request_id=request_id,
        scope=scope,
        text=text,
        provenance=provenance_to_proto(provenance),
        kind=number(labels.kind),
        key=labels.key,
        tags=labels.tags,
        source_ids=labels.source_ids,
    )


def added_from_proto(
    answer: pb.AddReflectionsResponse, count: int, address: str
) -> list[str | DomainError | CallFailed]:
    """The ids of `count` reflections, or what they failed with. Raises ValueError for an answer that violates the
    contract."""
    if len(answer.items) != count:
        raise ValueError(f"{len(answer.items)} items for {count} reflections")
    if any(item.WhichOneof("result") is None for item in answer.items):
        raise ValueError("an item has no result")
    return [
        item_error(item.error, address, "AddReflections") if item.HasField("error") else item.added.reflection_id
        for item in answer.items
    ]


def reflection_to_proto(reflection: StoredReflection) -> pb.StoredReflection:
    return pb.StoredReflection(
        reflection_id=reflection.reflection_id,
        scope=reflection.scope,
        text=reflection.text,
        provenance=provenance_to_proto(reflection.provenance),
        version=reflection.version,
        created_at=_timestamp(reflection.created_at),
        deleted_version=reflection.deleted_version,
        kind=number(reflection.kind),
        key=reflection.key,
        tags=reflection.tags,
        source_ids=reflection.source_ids,
        status=number(reflection.status),
        revision=reflection.revision,
        uplift=None if reflection.uplift is None else _uplift_to_proto(reflection.uplift),
        erased_version=reflection.erased_version,
    )


def reflection_from_proto(message: pb.StoredReflection) -> StoredReflection:
    """A server of an earlier contract leaves kind, status and revision at 0."""
    not_negative("version", [message.version])
    not_negative("revision", [message.revision])
    return StoredReflection(
        reflection_id=message.reflection_id,
        scope=message.scope,
        text=message.text,
        provenance=provenance_from_proto(message.provenance),
        version=message.version,
        created_at=message.created_at.ToDatetime(UTC),
        deleted_version=message.deleted_version if message.HasField("deleted_version") else None,
        kind=named(ReflectionKind, message.kind, ReflectionKind.RULE),
        key=message.key,
        tags=tuple(message.tags),
        source_ids=tuple(message.source_ids),
        status=named(ReflectionStatus, message.status, ReflectionStatus.CANDIDATE),
        revision=message.revision or 1,
        uplift=_uplift_from_proto(message.uplift) if message.HasField("uplift") else None,
        erased_version=message.erased_version if message.HasField("erased_version") else None,
    )


def _uplift_to_proto(uplift: Uplift) -> pb.Uplift:
    return pb.Uplift(
        uses_shown=uplift.uses_shown,
        uses_left_out=uplift.uses_left_out,
        mean_reward_shown=uplift.mean_shown,
        mean_reward_left_out=uplift.mean_left_out,
        uplift=uplift.uplift,
        lower=uplift.lower,
        upper=uplift.upper,
    )


def _uplift_from_proto(message: pb.Uplift) -> Uplift:
    not_negative("uplift.uses", [message.uses_shown, message.uses_left_out])
    finite("uplift.mean_reward", [message.mean_reward_shown, message.mean_reward_left_out])
    finite("uplift", [message.lower, message.upper, message.uplift])
    return Uplift(
        uses_shown=message.uses_shown,
        uses_left_out=message.uses_left_out,
        mean_shown=message.mean_reward_shown,
        mean_left_out=message.mean_reward_left_out,
        uplift=message.uplift if message.HasField("uplift") else None,
        lower=message.lower,
        upper=message.upper,
    )


def query_to_proto(query: ReflectionQuery, trial: Trial | None = None) -> pb.QueryReflectionsRequest:
    return pb.QueryReflectionsRequest(
        scope=query.scope,
        environment=query.environment,
        strategy=number(query.strategy),
        limit=query.limit,
        as_of_version=query.version,
        text=query.text,
        embedding=query.embedding,
        kinds=map(number, query.kinds),
        key=query.key,
        tags=query.tags,
        task_prefix=query.task_prefix,
        max_tokens=query.max_tokens,
        mix=[pb.MixPart(strategy=number(part.strategy), limit=part.limit) for part in query.mix],
        trial=None if trial is None else pb.Trial(use_keys=trial.use_keys, holdout=trial.holdout, seed=trial.seed),
    )


def query_from_proto(request: pb.QueryReflectionsRequest) -> ReflectionQuery:
    return ReflectionQuery(
        scope=request.scope,
        environment=request.environment,
        strategy=named(RetrievalStrategy, request.strategy),
        limit=request.limit or 1,
        version=request.as_of_version if request.HasField("as_of_version") else None,
        text=request.text,
        embedding=tuple(request.embedding),
        kinds=tuple(named(ReflectionKind, kind) for kind in request.kinds),
        key=request.key,
        tags=tuple(request.tags),
        task_prefix=request.task_prefix,
        max_tokens=request.max_tokens,
        mix=tuple(MixPart(named(RetrievalStrategy, part.strategy), part.limit) for part in request.mix),
    )


def retrieved_to_proto(retrieved: Retrieved) -> pb.QueryReflectionsResponse:
    return pb.QueryReflectionsResponse(
        reflections=map(reflection_to_proto, retrieved.reflections),
        version=retrieved.version,
        uses=[pb.Use(use_id=use.use_id, use_key=use.use_key, left_out_id=use.left_out_id) for use in retrieved.uses],
    )


def retrieved_from_proto(response: pb.QueryReflectionsResponse, use_keys: Sequence[str] = ()) -> Retrieved:
    """`use_keys` are those of the trial that was asked for."""
    not_negative("version", [response.version])
    reflections = tuple(map(reflection_from_proto, response.reflections))
    wanted = list(use_keys) if reflections else []
    keys = [use.use_key for use in response.uses]
    if keys != wanted:
        raise ValueError(f"uses for {len(keys)} keys, not one for each of the {len(wanted)} that were asked for")
    known = {"", *(one.reflection_id for one in reflections)}
    for use in response.uses:
        if not use.use_id or use.left_out_id not in known:
            raise ValueError(f"use {use.use_key!r:.200}: no use_id, or a left_out_id that was not retrieved")
    uses = tuple(Use(use.use_id, use.use_key, use.left_out_id) for use in response.uses)
    return Retrieved(reflections, response.version, uses)


def explained_to_proto(explained: Explained) -> pb.ExplainReflectionResponse:
    return pb.ExplainReflectionResponse(
        reflection=reflection_to_proto(explained.reflection),
        uses=[
            pb.RecordedUse(
                use_id=use.use_id,
                use_key=use.use_key,
                shown=use.shown,
                revision=use.revision,
                holdout=use.holdout,
                reward=use.reward,
                drawn_at=_timestamp(use.drawn_at),
            )
            for use in explained.uses
        ],
        sources=map(reflection_to_proto, explained.sources),
        derived_ids=explained.derived_ids,
    )


def explained_from_proto(response: pb.ExplainReflectionResponse) -> Explained:
    return Explained(
        reflection=reflection_from_proto(response.reflection),
        uses=tuple(map(_recorded_use, response.uses)),
        sources=tuple(map(reflection_from_proto, response.sources)),
        derived_ids=tuple(response.derived_ids),
    )


def _recorded_use(message: pb.RecordedUse) -> RecordedUse:
    finite("uses.holdout", [message.holdout])
    finite("uses.reward", [message.reward])
    return RecordedUse(
        use_id=message.use_id,
        use_key=message.use_key,
        shown=message.shown,
        revision=message.revision,
        holdout=message.holdout,
        reward=message.reward if message.HasField("reward") else None,
        drawn_at=message.drawn_at.ToDatetime(UTC),
    )


def change_to_proto(change: MemoryChange) -> pb.Change:
    return pb.Change(
        scope=change.scope,
        version=change.version,
        action=change.action,
        reflection_id=change.reflection_id,
        actor=change.actor,
        changed_at=_timestamp(change.changed_at),
        detail=change.detail,
    )


def change_from_proto(message: pb.Change) -> MemoryChange:
    not_negative("changes.version", [message.version])
    return MemoryChange(
        scope=message.scope,
        version=message.version,
        action=message.action,
        reflection_id=message.reflection_id,
        actor=message.actor,
        changed_at=message.changed_at.ToDatetime(UTC),
        detail=message.detail,
    )


def _timestamp(moment: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(moment)
    return message
