"""Protobuf ↔ domain types that the policy's servicer and its client share."""

from __future__ import annotations

from datetime import UTC

from mulligan.policy.v1 import policy_admin_service_pb2 as pb

from services.common.types import PolicyVersion, VersionState
from services.common.wire import weights_kind_from_proto, weights_kind_to_proto

_STATES = {state: pb.VersionState.Value(f"VERSION_STATE_{state.name}") for state in VersionState}
_STATES_BACK = {value: key for key, value in _STATES.items()}


def version_to_proto(version: PolicyVersion) -> pb.PolicyVersion:
    message = pb.PolicyVersion(
        policy_version=version.policy_version,
        kind=weights_kind_to_proto(version.kind),
        state=_STATES[version.state],
        sha256=version.sha256,
        fingerprint=version.fingerprint,
        problem=version.problem,
        canary_difference=version.canary_difference,
        engine_checksum=version.engine_checksum,
        model=version.model,
    )
    message.created_at.FromDatetime(version.created_at)
    return message


def version_from_proto(message: pb.PolicyVersion) -> PolicyVersion:
    return PolicyVersion(
        policy_version=message.policy_version,
        kind=weights_kind_from_proto(message.kind),
        state=_STATES_BACK[message.state],
        sha256=message.sha256,
        fingerprint=message.fingerprint,
        created_at=message.created_at.ToDatetime(UTC),
        problem=message.problem,
        canary_difference=message.canary_difference if message.HasField("canary_difference") else None,
        engine_checksum=message.engine_checksum,
        model=message.model,
    )
