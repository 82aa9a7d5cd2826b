"""Which of several policy servers may be asked for a policy: those that serve the same model at the same version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mulligan.common.errors import CallFailed, DomainError, Reason
from mulligan.common.inference import Feature, PolicyInfo, PolicyState, PolicyVersion, PublishedWeights, VersionState
from mulligan.common.replicas import ServerReplica as Replica
from mulligan.policy.client import PolicyClient

# What servers of one policy have in common.
_ALIKE = (
    "fingerprint",
    "context_length",
    "vocabulary_size",
    "end_of_turn_token_ids",
    "rewrites_history",
    "deterministic",
    "features",
    "frozen",
)
_TELLING = (VersionState.SERVING, VersionState.WITHDRAWN, VersionState.REFUSED, VersionState.KEPT)


class Server:
    """A client, and what is known of the policies there, by name: how they were last, and why one is not asked: None
    when it is. A policy of which nothing is known has to be looked at first."""

    def __init__(self, client: PolicyClient):
        self.client = client
        self.infos: dict[str, PolicyInfo] = {}
        self.refusals: dict[str, DomainError | None] = {}
        self.turn = 0  # of the last call

    def asked(self, policy: str) -> bool:
        return policy in self.refusals and self.refusals[policy] is None

    async def close(self) -> None:
        await self.client.close()


@dataclass
class Shared:
    """`version` is that at which servers are asked; `target` its weights, where they were published here."""

    name: str
    reference: PolicyInfo
    version: int
    target: PublishedWeights | None = None


def agreed(name: str, found: Mapping[Replica[Server], PolicyInfo | DomainError]) -> Shared:
    """Raises DomainError that says which server has another model, or not the policy."""
    best: PolicyInfo | None = None
    where = ""
    for replica, info in found.items():
        if isinstance(info, PolicyInfo) and (best is None or info.policy_version > best.policy_version):
            best = info
            where = replica.address
    assert best is not None
    for replica, info in found.items():
        if isinstance(info, DomainError):
            raise at(replica.address, info)
        if differs := unlike(best, info):
            message = (
                f"policy {name!r} is not the same at all servers: {differs} is {getattr(best, differs)!r} at {where} "
                f"and {getattr(info, differs)!r} at {replica.address}"
            )
            raise DomainError(Reason.MODEL_MISMATCH, message)
    return Shared(name, best, best.policy_version)


def refusal_of(policy: Shared, info: PolicyInfo) -> DomainError | None:
    """Why a server with this is not asked; ENGINE_UNAVAILABLE passes by itself."""
    if differs := unlike(policy.reference, info):
        ours = getattr(policy.reference, differs)
        theirs = getattr(info, differs)
        return DomainError(Reason.MODEL_MISMATCH, f"{differs} is {theirs!r}, elsewhere it is {ours!r}")
    if _has_versions(info) and info.policy_version != policy.version:
        message = f"version {info.policy_version} serves, elsewhere it is {policy.version}"
        return DomainError(Reason.POLICY_VERSION_TOO_OLD, message)
    if info.state is PolicyState.REFUSED:
        return DomainError(Reason.POLICY_REFUSED, info.problem)
    if info.state is PolicyState.UNAVAILABLE:
        return DomainError(Reason.ENGINE_UNAVAILABLE, info.problem or "no engine answers")
    return None


def unlike(reference: PolicyInfo, info: PolicyInfo) -> str:
    """The first field in which they differ and must not, "" when there is none."""
    return next((name for name in _ALIKE if getattr(reference, name) != getattr(info, name)), "")


def _has_versions(info: PolicyInfo) -> bool:
    """Whether weights can be published to it: otherwise a version counts loaded models, which may differ."""
    return not info.frozen and not info.features.isdisjoint((Feature.FULL_WEIGHTS, Feature.LORA_WEIGHTS))


def is_refusal(result: object) -> bool:
    """As against a server that went away meanwhile."""
    return isinstance(result, DomainError | OSError) or (isinstance(result, CallFailed) and not result.timed_out)


def at(address: str, error: object) -> BaseException:
    assert isinstance(error, BaseException)
    if not isinstance(error, DomainError):
        return error
    return DomainError(error.reason, f"{address}: {error.message}", retry_after=error.retry_after, **error.metadata)


def tells(version: PolicyVersion) -> int:
    return _TELLING.index(version.state) if version.state in _TELLING else len(_TELLING)
