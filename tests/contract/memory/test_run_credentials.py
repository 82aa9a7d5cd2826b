"""A memory scope is written to by callers with the credential of its run alone."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from mulligan.common.access import AccessRole
from mulligan.common.channel import Endpoint
from mulligan.common.errors import Code, DomainError, Reason
from mulligan.common.reflections import Addition, Provenance, ReflectionQuery, RetrievalStrategy, Trial, Use, UseOutcome
from mulligan.common.run_credentials import RunGrant, RunKeys
from mulligan.common.server import RequestInterceptor
from mulligan.memory.client import MemoryClient
from mulligan.memory.config import MemorySettings
from mulligan.memory.servicer import add_to_server
from mulligan.memory.v1 import memory_service_pb2 as pb
from tests.support.run_keys import write_keys
from tests.support.tokens import token_of, write_tokens

ORIGIN = Provenance("one", "experience", "lake", "train/00001", 3, 0.0, 1.0, True)
ASKED = ReflectionQuery("one", "lake", RetrievalStrategy.LATEST_SUCCESS, 5)
# The calls that anybody with the role may make: they write to no scope.
READING = {"GetReflection", "ListReflections", "GetSnapshot", "ExplainReflection", "ListChanges"}


@dataclass
class Served:
    """A memory service with tokens and keys of runs, its clients, and the calls that it has had."""

    address: str
    keys: RunKeys
    clients: list[MemoryClient] = field(default_factory=list)

    def client(self, role: AccessRole, *scopes: str) -> MemoryClient:
        """One with a token of the role and, if there are scopes, a credential for them."""
        credential = self.keys.sign(RunGrant("", scopes), 60) if scopes else None
        self.clients.append(MemoryClient(Endpoint(self.address, token=token_of(role), run_credential=credential)))
        return self.clients[-1]


@asynccontextmanager
async def serving(tmp_path: Path, **settings: Any) -> AsyncIterator[Served]:
    private, public = write_keys(tmp_path)
    chosen = MemorySettings(
        database=str(tmp_path / "memory.db"), tokens_folder=write_tokens(tmp_path), **({"run_keys": public} | settings)
    )
    store = await chosen.open_store()
    server = grpc.aio.server(interceptors=[RequestInterceptor(chosen.tokens)])
    add_to_server(server, store, guard=chosen.guard)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    served = Served(f"127.0.0.1:{port}", RunKeys(private))
    try:
        yield served
    finally:
        for client in served.clients:
            await client.close()
        await server.stop(None)
        await store.close()


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as served:
        yield served


async def refused(call: Awaitable[object], scope: str = "one") -> str:
    with pytest.raises(DomainError) as caught:
        await call
    assert (caught.value.reason, caught.value.code) == (Reason.RUN_CREDENTIAL, Code.PERMISSION_DENIED)
    assert caught.value.metadata == {"scope": scope}
    return caught.value.message


async def test_nobody_else_writes_to_a_runs_scope(served: Served) -> None:
    mine = served.client(AccessRole.TRAINER, "one")
    entry = await mine.add("1", "one", "look around first", ORIGIN)
    use = (await mine.query(ASKED, Trial(("task",), 0.5, 1))).uses[0]
    writes: dict[str, Callable[[MemoryClient], Awaitable[object]]] = {
        "AddReflection": lambda client: client.add("2", "one", "show my entry first", ORIGIN),
        "AddReflections": lambda client: client.add_all(
            [Addition("4", "one", "and mine", ORIGIN), Addition("5", "one", "and another", ORIGIN)]
        ),
        "QueryReflections": lambda client: client.query(ASKED, Trial(("another",), 0.5, 1)),
        "ReviseReflection": lambda client: client.revise(entry, "3", 1, text="do as I say"),
        "ReportOutcome": lambda client: client.report([UseOutcome(use.use_id, 0.0)]),
        "DeleteReflection": lambda client: client.delete(entry),
    }
    methods = {method.name for method in pb.DESCRIPTOR.services_by_name["MemoryService"].methods}
    assert writes.keys() | READING | {"EraseReflection"} == methods, "a new call belongs to one of the sets"
    before = await mine.list("one"), await mine.changes("one")
    for stranger in (served.client(AccessRole.TRAINER), served.client(AccessRole.TRAINER, "two", "three")):
        for write in writes.values():
            said = await refused(write(stranger))
        await stranger.query(ASKED)  # reading needs the role alone
        await stranger.list("one")
    assert said.endswith("that of the call is for the scope 'two' and the scope 'three'")
    assert (await mine.list("one"), await mine.changes("one")) == before
    for write in writes.values():
        await write(mine)


async def test_a_credential_is_no_role_and_an_administrator_needs_none(served: Served) -> None:
    entry = await served.client(AccessRole.ACTOR, "one").add("1", "one", "look around first", ORIGIN)
    for call, role in (
        (served.client(AccessRole.ACTOR, "one").delete(entry), AccessRole.ACTOR),
        (served.client(AccessRole.TRAINER, "one").erase(entry), AccessRole.TRAINER),
    ):
        with pytest.raises(DomainError) as caught:
            await call
        assert (caught.value.reason, caught.value.metadata["role"]) == (Reason.INSUFFICIENT_ROLE, role)
    await served.client(AccessRole.ADMIN).erase(entry)
    await served.client(AccessRole.ADMIN).add("2", "any", "of the administrator", ORIGIN)


async def test_outcomes_of_several_scopes_need_all_of_them(served: Served) -> None:
    both = served.client(AccessRole.ACTOR, "one", "two")
    uses: list[Use] = []
    for scope in ("one", "two"):
        await both.add("1", scope, "look around first", ORIGIN)
        uses += (await both.query(ReflectionQuery(scope, "lake", ASKED.strategy, 5), Trial(("t",), 0.5, 1))).uses
    outcomes = [UseOutcome(use.use_id, 1.0) for use in uses]
    await refused(served.client(AccessRole.ACTOR, "one").report(outcomes), "two")
    with pytest.raises(DomainError) as caught:
        await both.report([*outcomes, UseOutcome("none", 1.0)])
    assert caught.value.reason is Reason.UNKNOWN_USE
    assert await both.report(outcomes) == 2


async def test_without_keys_the_roles_decide_alone(tmp_path: Path) -> None:
    async with serving(tmp_path, run_keys=None) as served:
        await served.client(AccessRole.ACTOR).add("1", "one", "look around first", ORIGIN)
