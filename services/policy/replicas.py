"""Several policy servers as one `PolicyPort`, at one version.

**Which server is asked.** A call goes to the server with the fewest calls in flight, in turns if they are equal. A
session stays with its server, for the engine's prefix cache; when that server is away, it moves for good. A call that
was not answered is repeated at another server: with a seed the answer is the same, without one it is another sample.

**Which version.** New weights go to every server. The update succeeds when all servers that are up, and served the
version before, took them. When one of these refuses them, the others are rolled back, so that no two serve different
versions, and the update fails as that of one server does. A server that was away, joins, or comes back without its
weights is brought to the version before it is asked. One that cannot be is left out, and the run is told why.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, unquote

import structlog
from cachetools import LRUCache

from mulligan.common.addresses import Addresses
from mulligan.common.channel import Backoff, Endpoint, for_servers
from mulligan.common.errors import CallFailed, DomainError, Reason, ServiceUnavailable
from mulligan.common.inference import (
    CallOptions,
    Completion,
    Feature,
    PolicyInfo,
    PolicyState,
    PolicyVersion,
    Prompt,
    PublishedWeights,
    SamplingParams,
    VersionState,
    WeightsKind,
)
from mulligan.common.replicas import Replicas, ServerReplica
from mulligan.common.waits import Wait
from mulligan.policy.client import PolicyClient

log = structlog.get_logger()
R = TypeVar("R")
_PLAIN = CallOptions()
_MOST_SESSIONS = 65_536  # those that asked longest ago are forgotten, and may move when they ask again
_TO_UPLOAD = "replicas:"
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
_ELSEWHERE = (
    Reason.POLICY_VERSION_TOO_OLD,
    Reason.POLICY_REFUSED,
    Reason.ENGINE_UNAVAILABLE,
    Reason.UNKNOWN_POLICY,
)


class KnownServer:
    """The client of one server, and what is known of its policies, by name.

    `infos` has their last descriptions. `refusals` says why a policy is not asked there, None if it is; one that is
    missing there has to be looked at first.
    """

    def __init__(self, client: PolicyClient):
        self.client = client
        self.infos: dict[str, PolicyInfo] = {}
        self.refusals: dict[str, DomainError | None] = {}
        self.turn = 0  # of the last call

    def asked(self, policy: str) -> bool:
        return policy in self.refusals and self.refusals[policy] is None

    async def close(self) -> None:
        await self.client.close()


def connect(
    endpoint: Endpoint,
    *,
    timeout: float = 300.0,
    update_timeout: float = 600.0,
    on_outage: Callable[[str], None] | None = None,
) -> PolicyClient | PolicyReplicas:
    """The client of all servers that the endpoint's address names. Raises ValueError for a bad address."""
    addresses = Addresses.parse(endpoint.address)

    def open_client(endpoint: Endpoint) -> PolicyClient:
        return PolicyClient(endpoint, timeout=timeout, update_timeout=update_timeout, on_outage=on_outage)

    if addresses.single:
        return open_client(endpoint)

    servers = for_servers(endpoint, addresses)

    def open_server(address: str) -> KnownServer:
        return KnownServer(open_client(replace(servers, address=address, outage_seconds=0.0)))

    return PolicyReplicas(addresses, open_server, outage_seconds=endpoint.outage_seconds, on_outage=on_outage)


class PolicyReplicas:
    """A `PolicyPort`, made by `connect`. Calls wait `outage_seconds` while no server can be asked.

    A call (`_ask`) chooses a server that may be asked for its policy, and another one when that fails. `_check` runs in
    the background for each server that is not used: it looks at its policies and brings those that are behind to their
    version. An update (`_publish`) goes to all servers at once, and `_take_back` rolls them back.

    `_publishing` is a lock of the caller's process. Those of the servers cannot keep two updates of one caller apart:
    each server might take them in another order.
    """

    def __init__(
        self,
        addresses: Addresses,
        open_server: Callable[[str], KnownServer],
        *,
        outage_seconds: float,
        on_outage: Callable[[str], None] | None = None,
    ):
        self._replicas: Replicas[KnownServer] = Replicas(
            addresses, open_server, self._check, outage_seconds=outage_seconds, notice=on_outage
        )
        self._policies: dict[str, PolicyInfo] = {}  # as all servers have them, at the version that these are asked at
        self._targets: dict[str, PublishedWeights] = {}  # the weights of that version, if they were published here
        self._names: dict[str, str] = {}  # as asked, "" for the default policy → as the servers call it
        self._sessions: LRUCache[str, ServerReplica[KnownServer]] = LRUCache(_MOST_SESSIONS)
        self._turns = itertools.count(1)
        self._publishing = asyncio.Lock()

    @property
    def waiting_for(self) -> str:
        """What calls wait for now; "" if none does."""
        return self._replicas.waits.text

    async def info(self, policy: str = "") -> PolicyInfo:
        """Of the version that servers are asked at; a greater one that somebody else gave to one of these counts.

        Raises DomainError UNKNOWN_POLICY, or MODEL_MISMATCH when servers differ and no run has published yet."""
        found = await self._ask_all(lambda client: client.info(policy))
        infos = {replica: info for replica, info in found.items() if isinstance(info, PolicyInfo)}
        if not infos:
            raise next(error for error in found.values() if isinstance(error, DomainError))
        name = next(iter(infos.values())).name
        asked = {replica: info for replica, info in infos.items() if replica.client.asked(name)}
        if not self._publishing.locked() or name not in self._policies:
            shared = self._policies.get(name)
            numbers = {info.policy_version for info in asked.values()}
            if shared is None or name not in self._targets or not numbers or max(numbers) > shared.policy_version:
                shared = self._policies[name] = _agreed(name, found)
                self._targets.pop(name, None)
                asked = infos
            for replica, info in infos.items():
                replica.client.infos[name] = info
                self._judge(replica, shared, info)
        self._names[policy] = name
        best = max((asked or infos).values(), key=lambda info: (info.policy_version, info.state is PolicyState.SERVING))
        return replace(
            best,
            compute_seconds=sum(info.compute_seconds for info in infos.values()),
            draining_models=sum(info.draining_models for info in infos.values()),
            replicas=tuple(
                replace(engine, address=f"{replica.address} {engine.address}".strip())
                for replica, info in infos.items()
                for engine in info.replicas
            ),
        )

    async def versions(self, policy: str = "") -> tuple[PolicyVersion, ...]:
        """All that any server ever saw, newest first; of two records of one, that which tells more."""
        found = await self._ask_all(lambda client: client.versions(policy))
        answers = [answer for answer in found.values() if not isinstance(answer, DomainError)]
        if not answers:
            raise next(error for error in found.values() if isinstance(error, DomainError))
        merged: dict[int, PolicyVersion] = {}
        for version in itertools.chain.from_iterable(answers):
            other = merged.setdefault(version.policy_version, version)
            if _tells(version) < _tells(other):
                merged[version.policy_version] = version
        return tuple(merged[number] for number in sorted(merged, reverse=True))

    async def generate(self, prompt: Prompt, sampling: SamplingParams, options: CallOptions = _PLAIN) -> Completion:
        return await self._ask(options, lambda client: client.generate(prompt, sampling, options))

    async def tokenize(self, prompt: Prompt | str, options: CallOptions = _PLAIN) -> tuple[int, ...]:
        return await self._ask(options, lambda client: client.tokenize(prompt, options))

    async def upload_weights(self, path: Path, kind: WeightsKind, sha256: str, policy: str = "") -> str:
        """A URI for `update_weights`, which sends the file to each server, and again to one that comes back."""
        return f"{_TO_UPLOAD}{quote(str(path))}"

    async def update_weights(self, weights: PublishedWeights, policy: str = "") -> float | None:
        """The greatest difference that a server's canary found. Raises as `PolicyClient.update_weights`, and names the
        server; then each serves what it served before."""
        since = time.monotonic()
        while True:
            await self._known(policy)
            async with self._publishing:
                differences = await self._publish(weights, self._policies[self._names[policy]])
            if differences:
                return max((found for found in differences if found is not None), default=None)
            await self._replicas.change(since)

    async def close(self) -> None:
        await self._replicas.close()

    async def _known(self, policy: str) -> PolicyInfo:
        if policy not in self._names:
            await self.info(policy)
        return self._policies[self._names[policy]]

    async def _ask(self, options: CallOptions, call: Callable[[PolicyClient], Awaitable[R]]) -> R:
        await self._known(options.policy)
        backoff = Backoff(self._replicas.text, self._replicas.outage_seconds)
        with self._replicas.waits.call() as wait:
            return await self._ask_until_answered(options, call, backoff, wait)

    async def _ask_until_answered(
        self, options: CallOptions, call: Callable[[PolicyClient], Awaitable[R]], backoff: Backoff, wait: Wait
    ) -> R:
        since: float | None = None
        full: dict[ServerReplica[KnownServer], ServiceUnavailable] = {}
        while True:
            policy = await self._known(options.policy)  # as it is now: it may have been published meanwhile
            replica = self._choose(policy.name, options.session_id, full)
            if replica is None and full:
                _, last = full.popitem()
                full.clear()
                wait.begin(last.cause)
                await backoff.wait(last.cause, last.refusal)
                continue
            if replica is None:
                self._refuse_without_hope(policy, options)
                since = since or time.monotonic()
                await self._replicas.change(since)
                continue
            replica.in_flight += 1
            try:
                answer = await call(replica.client.client)
                wait.answered()
                return answer
            except ServiceUnavailable as error:
                if error.refusal is None:
                    self._replicas.failed(replica, error.cause)
                elif error.refusal.reason in _ELSEWHERE:
                    self._set_aside(replica, policy)
                else:
                    full[replica] = error
            except DomainError as error:
                if error.reason not in _ELSEWHERE:
                    raise
                if policy.name not in self._targets and error.reason is Reason.POLICY_VERSION_TOO_OLD:
                    raise  # nothing that it could be brought to
                self._set_aside(replica, policy)
            finally:
                replica.in_flight -= 1

    def _choose(
        self, policy: str, session_id: str, but: dict[ServerReplica[KnownServer], ServiceUnavailable]
    ) -> ServerReplica[KnownServer] | None:
        able = [replica for replica in self._replicas.usable if replica.client.asked(policy) and replica not in but]
        if not able:
            return None
        chosen = self._sessions.get(session_id) if session_id else None
        if chosen is None or chosen not in able:
            chosen = min(able, key=lambda replica: (replica.in_flight, replica.client.turn))
        chosen.client.turn = next(self._turns)
        if session_id:
            self._sessions[session_id] = chosen
        return chosen

    def _refuse_without_hope(self, policy: PolicyInfo, options: CallOptions) -> None:
        """Raises when all servers that are up were looked at, and none can be asked."""
        said = [replica.client.refusals.get(policy.name) for replica in self._replicas.usable]
        refusals = [refusal for refusal in said if refusal is not None]
        if not refusals or len(refusals) < len(said) or Reason.ENGINE_UNAVAILABLE in {r.reason for r in refusals}:
            return
        if options.min_policy_version is None or all(r.reason is Reason.POLICY_REFUSED for r in refusals):
            raise refusals[0]
        message = (
            f"no server of {policy.name!r} serves version {policy.policy_version}: {'; '.join(map(str, refusals))}"
        )
        raise DomainError(Reason.POLICY_VERSION_TOO_OLD, message)

    def _set_aside(self, replica: ServerReplica[KnownServer], policy: PolicyInfo) -> None:
        """It is not asked until it was looked at."""
        replica.client.refusals.pop(policy.name, None)
        self._replicas.check(replica)

    async def _ask_all(
        self, ask: Callable[[PolicyClient], Awaitable[R]]
    ) -> dict[ServerReplica[KnownServer], R | DomainError]:
        """What each server that is up answers; waits for the first."""
        await self._replicas.ready()
        since = time.monotonic()
        while True:
            present = self._replicas.present
            answers = await asyncio.gather(*(ask(replica.client.client) for replica in present), return_exceptions=True)
            found: dict[ServerReplica[KnownServer], R | DomainError] = {}
            for replica, answer in zip(present, answers, strict=True):
                if isinstance(answer, ServiceUnavailable | CallFailed):
                    self._replicas.failed(replica, getattr(answer, "cause", str(answer)))
                elif isinstance(answer, BaseException) and not isinstance(answer, DomainError):
                    raise answer
                else:
                    found[replica] = answer
            if found:
                return found
            await self._replicas.change(since)

    async def _check(self, replica: ServerReplica[KnownServer]) -> bool:
        """Whether all policies in use can be asked there; brings those that are behind to their version."""
        async with self._publishing:
            pass
        if not self._policies:
            await replica.client.client.info()
        for policy in tuple(self._policies.values()):
            try:
                info = replica.client.infos[policy.name] = await replica.client.client.info(policy.name)
                target = self._targets.get(policy.name)
                behind = info.policy_version < policy.policy_version and not _unlike(policy, info)
                if target is not None and behind:
                    await self._bring(replica, target, policy.name)
                    log.info(
                        "a server was brought to a version", endpoint=replica.address, version=policy.policy_version
                    )
                    info = replica.client.infos[policy.name]
            except DomainError as error:
                self._refuse(replica, policy, error)
            except OSError as error:  # of the file that is uploaded
                self._refuse(replica, policy, DomainError(Reason.WEIGHTS_NOT_FOUND, str(error)))
            else:
                self._judge(replica, policy, info)
        return all(replica.client.asked(name) for name in self._policies)

    def _judge(self, replica: ServerReplica[KnownServer], policy: PolicyInfo, info: PolicyInfo) -> None:
        self._refuse(replica, policy, _refusal_of(policy, info))

    def _refuse(self, replica: ServerReplica[KnownServer], policy: PolicyInfo, refusal: DomainError | None) -> None:
        """Does not ask a server for this policy until it passes a check; None: asks it."""
        server = replica.client
        before = server.refusals.get(policy.name)
        server.refusals[policy.name] = refusal
        if refusal is not None:
            self._replicas.check(replica)
            if str(refusal) != str(before):
                self._replicas.tell(
                    "a policy server is not asked", endpoint=replica.address, policy=policy.name, cause=str(refusal)
                )
        elif before is not None:
            self._replicas.tell("a policy server is asked again", endpoint=replica.address, policy=policy.name)
        self._replicas.wake()

    async def _bring(self, replica: ServerReplica[KnownServer], weights: PublishedWeights, name: str) -> float | None:
        client = replica.client.client
        if weights.uri.startswith(_TO_UPLOAD):
            path = Path(unquote(weights.uri.removeprefix(_TO_UPLOAD)))
            weights = replace(weights, uri=await client.upload_weights(path, weights.kind, weights.sha256, name))
        difference = await client.update_weights(weights, name)
        server = replica.client
        server.infos[name] = replace(server.infos[name], policy_version=weights.policy_version, problem="")
        return difference

    async def _publish(self, weights: PublishedWeights, policy: PolicyInfo) -> list[float | None]:
        """What the canaries of the servers that took the weights found; empty when all servers are away.

        `ServerPool.update` gives weights to the engines of one server, and shares no code with this. Engines load in
        steps, each finished by all before the next, and one that dies is taken out at once. One that refuses may hold a
        part of the new weights, so all load the old ones again. A policy server that refuses has put itself back, so
        only the others are rolled back. Nothing is taken back twice: a server answers when its own engines agree.
        """
        name = policy.name
        await self._replicas.ready()
        for replica in self._replicas.present:
            await self._replicas.suspend(replica)
        servers = [replica for replica in self._replicas.usable if name in replica.client.infos]
        asked = [replica for replica in servers if replica.client.asked(name)]
        before = {replica: replica.client.infos[name].policy_version for replica in servers}
        try:
            answers = await asyncio.gather(
                *(self._bring(replica, weights, name) for replica in servers), return_exceptions=True
            )
            results = dict(zip(servers, answers, strict=True))
            took = [replica for replica, result in results.items() if not isinstance(result, BaseException)]
            refused = {replica: result for replica, result in results.items() if _is_refusal(result)}
            fatal = [replica for replica in refused if replica in asked or not took]
            if fatal:
                await self._take_back({replica: before[replica] for replica in took}, policy)
                raise _at(fatal[0].address, refused[fatal[0]])
            for replica, result in results.items():
                if isinstance(result, BaseException) and replica not in refused:
                    self._replicas.failed(replica, getattr(result, "cause", str(result)))
            if took:
                self._targets[name] = weights
                policy = self._policies[name] = replace(took[0].client.infos[name], name=name)
            for replica in servers:
                if replica in took:
                    self._judge(replica, policy, replica.client.infos[name])
                else:
                    replica.client.refusals.pop(name, None)
            return [results[replica] for replica in took]  # type: ignore[misc]
        finally:
            for replica in self._replicas.present:
                self._replicas.check(replica)

    async def _take_back(self, before: dict[ServerReplica[KnownServer], int], policy: PolicyInfo) -> None:
        """Another server refused what these took. One that cannot go back is not asked from now on."""
        for replica, version in before.items():
            server = replica.client
            try:
                await server.client.rollback(version, policy.name)
            except (DomainError, CallFailed, ServiceUnavailable) as error:
                self._replicas.tell("a policy server could not be rolled back", endpoint=replica.address, cause=error)
                server.refusals.pop(policy.name, None)
            else:
                server.infos[policy.name] = replace(server.infos[policy.name], policy_version=version)


def _agreed(name: str, found: Mapping[ServerReplica[KnownServer], PolicyInfo | DomainError]) -> PolicyInfo:
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
            raise _at(replica.address, info)
        if differs := _unlike(best, info):
            message = (
                f"policy {name!r} is not the same at all servers: {differs} is {getattr(best, differs)!r} at {where} "
                f"and {getattr(info, differs)!r} at {replica.address}"
            )
            raise DomainError(Reason.MODEL_MISMATCH, message)
    return replace(best, name=name)


def _refusal_of(policy: PolicyInfo, info: PolicyInfo) -> DomainError | None:
    """Why a server with this is not asked; ENGINE_UNAVAILABLE passes by itself."""
    if differs := _unlike(policy, info):
        ours = getattr(policy, differs)
        theirs = getattr(info, differs)
        return DomainError(Reason.MODEL_MISMATCH, f"{differs} is {theirs!r}, elsewhere it is {ours!r}")
    if _has_versions(info) and info.policy_version != policy.policy_version:
        message = f"version {info.policy_version} serves, elsewhere it is {policy.policy_version}"
        return DomainError(Reason.POLICY_VERSION_TOO_OLD, message)
    if info.state is PolicyState.REFUSED:
        return DomainError(Reason.POLICY_REFUSED, info.problem)
    if info.state is PolicyState.UNAVAILABLE:
        return DomainError(Reason.ENGINE_UNAVAILABLE, info.problem or "no engine answers")
    return None


def _unlike(reference: PolicyInfo, info: PolicyInfo) -> str:
    """The first field in which they differ and must not, "" when there is none."""
    return next((name for name in _ALIKE if getattr(reference, name) != getattr(info, name)), "")


def _has_versions(info: PolicyInfo) -> bool:
    """Whether weights can be published to it: otherwise a version counts loaded models, which may differ."""
    return not info.frozen and not info.features.isdisjoint((Feature.FULL_WEIGHTS, Feature.LORA_WEIGHTS))


def _is_refusal(result: object) -> bool:
    """As against a server that went away meanwhile."""
    return isinstance(result, DomainError | OSError) or (isinstance(result, CallFailed) and not result.timed_out)


def _at(address: str, error: object) -> BaseException:
    assert isinstance(error, BaseException)
    if not isinstance(error, DomainError):
        return error
    return error.told(f"{address}: {error.message}")


def _tells(version: PolicyVersion) -> int:
    return _TELLING.index(version.state) if version.state in _TELLING else len(_TELLING)
