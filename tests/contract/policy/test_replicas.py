"""Several policy servers: who is asked, at which version, and what becomes of those that are away or differ."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection
from datetime import timedelta
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from typer.testing import CliRunner

from mulligan.cli.app import app
from mulligan.common import addresses
from mulligan.common.channel import Endpoint
from mulligan.common.errors import DomainError, Reason, ServiceUnavailable
from mulligan.common.inference import CallOptions, SamplingParams, VersionState
from mulligan.policy.client import PolicyClient
from mulligan.policy.replicas import PolicyReplicas, connect
from mulligan.trainer.sampling import ForeignWeights, NamedPolicy, PublishedPolicy, VersionLost
from tests.support.fakes import FakeLearner
from tests.support.policy_servers import PolicyServer, PolicyServers, policy_servers

PROMPT = [1, 2, 3]
SECONDS = 100.0


async def ask(servers: PolicyServers, session: str = "", version: int | None = None) -> int:
    """The version that answered."""
    options = CallOptions(session_id=session, min_policy_version=version)
    completion = await servers.client.generate(PROMPT, SamplingParams(seed=1), options)
    [found] = {span.policy_version for span in completion.policy_versions}
    return found


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not happened():  # noqa: ASYNC110 - servers tell nobody
            await asyncio.sleep(0.01)


async def noticed(servers: PolicyServers, *words: str) -> None:
    await until(lambda: any(all(word in notice for word in words) for notice in servers.notices))


async def run(servers: PolicyServers) -> PublishedPolicy:
    """A run's policy, whose learner writes real files."""

    class Learner(FakeLearner):
        async def publish_weights(self, policy_version: int, keep: Collection[int] = ()):  # type: ignore[no-untyped-def]
            return servers.weights(policy_version)

    actor = await NamedPolicy.open(servers.client, "")
    return PublishedPolicy(actor, Learner(), servers.notices.append)


async def test_one_address_is_the_plain_client() -> None:
    assert type(connect(Endpoint("127.0.0.1:1"))) is PolicyClient
    assert type(connect(Endpoint("127.0.0.1:1-2"))) is PolicyReplicas


async def test_calls_spread_and_sessions_stay(tmp_path: Path) -> None:
    async with policy_servers(tmp_path, 3) as servers:
        for _ in range(9):
            await ask(servers)
        assert [server.calls for server in servers.servers] == [3, 3, 3], "in turns"
        for server in servers.servers:
            server.engine.go_on.clear()
        waiting = [asyncio.create_task(ask(servers, f"s{number}")) for number in range(12)]
        await until(lambda: sum(server.calls for server in servers.servers) == 21)
        assert [server.calls for server in servers.servers] == [7, 7, 7], "to whom has fewest in flight"
        for server in servers.servers:
            server.engine.go_on.set()
        await asyncio.gather(*waiting)
        for _ in range(5):
            await ask(servers, "s0")
        assert sorted(server.calls for server in servers.servers) == [7, 7, 12]
        assert len(await servers.client.tokenize("two words")) == 2


async def test_a_session_moves_when_its_server_is_away_and_stays_there(tmp_path: Path) -> None:
    async with policy_servers(tmp_path) as servers:
        await ask(servers, "s")
        first, second = sorted(servers.servers, key=lambda server: -server.calls)
        assert (first.calls, second.calls) == (1, 0)
        await first.stop()
        await ask(servers, "s")
        assert second.calls == 1
        await first.start()
        await noticed(servers, "used again", first.address)
        await ask(servers, "s")
        assert (first.calls, second.calls) == (0, 2)


async def test_weights_reach_every_server(tmp_path: Path) -> None:
    async with policy_servers(tmp_path, 3) as servers:
        assert await servers.client.update_weights(servers.weights(1)) == 0.0
        assert servers.versions == [1, 1, 1]
        assert Counter([await ask(servers, version=1) for _ in range(6)]) == {1: 6}
        info = await servers.client.info()
        assert (info.policy_version, len(info.replicas), info.compute_seconds) == (1, 3, 4.5)
        assert [engine.address for engine in info.replicas] == [server.address for server in servers.servers]
        assert [(v.policy_version, v.state) for v in await servers.client.versions()] == [
            (1, VersionState.SERVING),
            (0, VersionState.KEPT),
        ]


async def test_uploads_reach_every_server_and_come_again(tmp_path: Path) -> None:
    async with policy_servers(tmp_path, weights_folder=tmp_path / "elsewhere") as servers:
        weights = servers.weights(1)
        with pytest.raises(DomainError, match=f"{servers.servers[0].address}: ") as caught:
            await servers.client.update_weights(weights)
        assert caught.value.reason is Reason.BAD_WEIGHTS_URI

        async def upload(path: Path) -> str:
            return await servers.client.upload_weights(path, weights.kind, weights.sha256)

        path = Path(unquote(urlsplit(weights.uri).path))
        await servers.client.update_weights(servers.weights(1, uri=await upload(path)))
        assert servers.versions == [1, 1]
        await servers.servers[1].restart()
        for _ in range(4):
            assert await ask(servers, version=1) == 1
        await until(lambda: servers.versions == [1, 1])


@pytest.mark.parametrize("session", ["", "s"])
async def test_a_server_without_its_weights_is_not_asked_until_it_has_them(tmp_path: Path, session: str) -> None:
    async with policy_servers(tmp_path) as servers:
        policy = await run(servers)
        await policy.publish()
        await policy.publish()
        for server in (*servers.servers, *servers.servers):
            server.opened.go_on.clear()
            restarting = asyncio.create_task(server.restart())
            answers = [policy.generate(PROMPT, SamplingParams(), CallOptions(session_id=session)) for _ in range(20)]
            for completion in await asyncio.gather(*answers):
                assert {span.policy_version for span in completion.policy_versions} == {2}
            server.opened.go_on.set()
            await restarting
            for completion in [await policy.generate(PROMPT, SamplingParams()) for _ in range(4)]:
                assert {span.policy_version for span in completion.policy_versions} == {2}
            async with asyncio.timeout(SECONDS):
                while server.engine.policy_version != 2 or not server.calls:
                    await policy.generate(PROMPT, SamplingParams())
        assert not any("lost version" in notice for notice in servers.notices), "the run knows nothing of it"


async def test_all_that_forgot_are_given_the_weights_again(tmp_path: Path) -> None:
    async with policy_servers(tmp_path) as servers:
        policy = await run(servers)
        await policy.publish()
        await asyncio.gather(*(server.restart() for server in servers.servers))
        answers = await asyncio.gather(*(policy.generate(PROMPT, SamplingParams()) for _ in range(8)))
        assert {span.policy_version for answer in answers for span in answer.policy_versions} == {1}
        await asyncio.gather(*(server.restart() for server in servers.servers))
        assert await policy.publish() == 2
        await until(lambda: servers.versions == [2, 2])  # at once, or as soon as it is known that a server is back


async def test_a_server_that_is_away_is_no_reason_to_wait(tmp_path: Path) -> None:
    async with policy_servers(tmp_path) as servers:
        policy = await run(servers)
        await servers.servers[0].stop()
        assert [await policy.publish(), await policy.publish()] == [1, 2]
        assert {span.policy_version for span in (await policy.generate(PROMPT, SamplingParams())).policy_versions} == {
            2
        }
        await servers.servers[0].start()
        async with asyncio.timeout(SECONDS):
            while not servers.servers[0].calls:
                await policy.generate(PROMPT, SamplingParams())
        assert servers.versions == [2, 2]
        assert await policy.publish() == 3 and servers.versions == [3, 3]


async def test_while_all_are_away_calls_wait_and_then_say_so(tmp_path: Path) -> None:
    async with policy_servers(tmp_path, outage_seconds=1.0) as servers:
        policy = await run(servers)
        await policy.publish()
        for server in servers.servers:
            await server.stop()
        address = servers.servers[1].address
        for call in (policy.generate(PROMPT, SamplingParams()), policy.publish()):
            with pytest.raises(ServiceUnavailable, match=f"was unreachable for 1 s: .*{address}: "):
                await call
        servers.client._replicas.outage_seconds = SECONDS
        waiting = asyncio.create_task(policy.generate(PROMPT, SamplingParams()))
        await servers.servers[1].start()
        assert {span.policy_version for span in (await waiting).policy_versions} == {1}


async def test_weights_that_one_server_refuses_serve_nowhere(tmp_path: Path) -> None:
    async with policy_servers(tmp_path, 3) as servers:
        policy = await run(servers)
        await policy.publish()
        servers.servers[1].spoil(2)
        with pytest.raises(
            DomainError, match=f"{servers.servers[1].address}: version 2.*differ from the trainer"
        ) as caught:
            await policy.publish()
        assert caught.value.reason is Reason.CANARY_FAILED
        assert servers.versions == [1, 1, 1], "those that had taken it went back"
        assert [await ask(servers, version=1) for _ in range(6)] == [1] * 6
        states = {version.policy_version: version.state for version in await servers.client.versions()}
        assert states == {0: VersionState.KEPT, 1: VersionState.SERVING, 2: VersionState.WITHDRAWN}
        servers.servers[1].spoil(99)
        assert await (await run(servers)).publish() == 3, "a version never means two things"
        assert servers.versions == [3, 3, 3]


async def test_the_first_weights_of_a_run_that_one_refuses(tmp_path: Path) -> None:
    async with policy_servers(tmp_path) as servers:
        policy = await run(servers)
        servers.servers[0].spoil(1)
        with pytest.raises(DomainError, match="CANARY_FAILED"):
            await policy.publish()
        assert servers.versions == [0, 0]


async def test_a_rollback_everywhere_ends_the_run_and_is_what_an_evaluation_sees(tmp_path: Path) -> None:
    async with policy_servers(tmp_path) as servers:
        policy = await run(servers)
        await policy.publish()
        await policy.publish()
        for server in servers.servers:
            assert server.policies is not None
            await server.policies.rollback(1, "")
        with pytest.raises(VersionLost, match="rolled back"):
            await policy.generate(PROMPT, SamplingParams())
        assert servers.versions == [1, 1], "what an administrator decided stays"
        named = await NamedPolicy.open(servers.client, "")
        assert named.info.policy_version == 1
        assert {span.policy_version for span in (await named.generate(PROMPT, SamplingParams())).policy_versions} == {1}


async def test_a_rollback_of_one_server_leaves_that_one_out(tmp_path: Path) -> None:
    async with policy_servers(tmp_path) as servers:
        policy = await run(servers)
        await policy.publish()
        await policy.publish()
        out, left = servers.servers
        assert out.policies is not None
        await out.policies.rollback(1, "")
        await policy.generate(PROMPT, SamplingParams())
        await policy.generate(PROMPT, SamplingParams())
        await noticed(servers, "not asked", out.address, "VERSION_CONFLICT", "withdrawn")
        assert left.calls == 2 and servers.versions == [1, 2]
        assert await policy.publish() == 3 and servers.versions == [3, 3], "the next version is for all"


async def test_somebody_elses_version_at_one_server_is_noticed(tmp_path: Path) -> None:
    async with policy_servers(tmp_path) as servers:
        policy = await run(servers)
        await policy.publish()
        other = PolicyClient(Endpoint(servers.servers[1].address))
        await other.update_weights(servers.weights(9))
        await other.close()
        with pytest.raises(ForeignWeights, match="version 9, but this run published 1"):
            await policy.publish()
        with pytest.raises(ForeignWeights, match="version 9, but this run published 1"):
            await asyncio.gather(*(policy.generate(PROMPT, SamplingParams()) for _ in range(2)))


async def test_servers_that_differ_are_told_apart(tmp_path: Path) -> None:
    async with policy_servers(tmp_path, policies={"reflector": {"model": "three"}}) as servers:
        one, two = (server.address for server in servers.servers)
        await servers.servers[1].restart(model="two")
        with pytest.raises(DomainError) as caught:
            await servers.client.info()
        assert caught.value.reason is Reason.MODEL_MISMATCH
        assert f"fingerprint is 'one' at {one} and 'two' at {two}" in caught.value.message
        await servers.servers[1].restart(policies={})
        with pytest.raises(DomainError, match=f"UNKNOWN_POLICY: {two}: ") as caught:
            await servers.client.info("reflector")
        with pytest.raises(DomainError, match="UNKNOWN_POLICY"):
            await servers.client.info("nobody")
        policy = await run(servers)
        await policy.publish()
        await servers.servers[1].restart(model="two")
        for _ in range(4):
            await policy.generate(PROMPT, SamplingParams())
        await noticed(servers, "not asked", two, "fingerprint is 'two', elsewhere it is 'one'")
        assert await policy.publish() == 2, "a run goes on without what comes back wrong"
        assert servers.servers[0].opened["one"].policy_version == 2


async def test_full_servers_are_passed_by_and_waited_for(tmp_path: Path) -> None:
    async with policy_servers(tmp_path) as servers:
        full = DomainError(Reason.QUEUE_FULL, "full", retry_after=timedelta(milliseconds=1))
        one, two = (server.engine for server in servers.servers)
        one.failures.append(full)
        await ask(servers)
        assert (len(one.asks), len(two.asks)) == (1, 1)
        one.failures.append(full)
        two.failures.append(full)
        await ask(servers)
        assert len(one.asks) + len(two.asks) == 5 and not one.failures + two.failures
        assert not servers.notices, "a full server is no failed one"


async def test_servers_that_a_name_stands_for_join_and_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with policy_servers(tmp_path, 3) as servers:
        named: list[PolicyServer] = []

        async def resolve(name: addresses.DnsName) -> list[str]:
            if not named:
                raise OSError(f"{name}: Name or service not known")
            return [server.address for server in named]

        monkeypatch.setattr(addresses, "_resolve", resolve)
        monkeypatch.setattr("mulligan.common.replicas._LOOK_UP_SECONDS", 0.05)
        lost = connect(Endpoint("dns:///policy:50052", outage_seconds=0.2))
        with pytest.raises(ServiceUnavailable, match="dns:///policy:50052: Name or service not known"):
            await lost.info()
        await lost.close()
        named += servers.servers[:2]
        client = connect(Endpoint("dns:///policy:50052", outage_seconds=20))
        assert isinstance(client, PolicyReplicas)
        found = PolicyServers(servers.servers, client, [], tmp_path)
        try:
            policy = await run(found)
            await policy.publish()
            assert servers.versions == [1, 1, 0]
            named[:] = servers.servers[1:]
            async with asyncio.timeout(SECONDS):
                while not servers.servers[2].calls:
                    completion = await policy.generate(PROMPT, SamplingParams())
                    assert {span.policy_version for span in completion.policy_versions} == {1}
            await policy.publish()
            assert servers.versions == [1, 2, 2]
        finally:
            await client.close()


async def test_the_command_line_asks_every_server(tmp_path: Path) -> None:
    async with policy_servers(tmp_path, models_folder=tmp_path) as servers:
        one, two = (server.address for server in servers.servers)

        async def said(*arguments: str, status: int = 0) -> str:
            environment = {"MULLIGAN_CLI_POLICY": f"{one},{two}", "COLUMNS": "200"}
            result = await asyncio.to_thread(CliRunner().invoke, app, ["policy", *arguments], env=environment)
            assert result.exit_code == status, result.output
            return result.output

        loaded = await said("load", "other", "--model", "embedded")
        assert [f"{address} policy other serves embedded as version 0" in loaded for address in (one, two)] == [
            True
        ] * 2
        rows = [line.split()[:3] for line in (await said("list")).splitlines()]
        assert [row for row in rows if row[0] in (one, two)] == [
            [address, name, "serving"] for address in (one, two) for name in ("actor", "other")
        ]
        await servers.client.update_weights(servers.weights(1))
        assert (await said("versions", "actor")).count(" serving ") == 2
        await said("rollback", "actor", "0")
        assert [server.opened["one"].policy_version for server in servers.servers] == [0, 0]
        await servers.servers[1].restart()
        refused = await said("unload", "other", status=1)
        assert f"{one} policy other is gone" in refused and f"error: {two}: UNKNOWN_POLICY" in refused
        assert f"server       {two}" in await said("show", "actor")
    assert "expected host:port" in await said("list", "--policy-address", "nowhere", status=2)
    assert "Name or service not known" in await said("list", "--policy-address", "dns:///no.invalid:1", status=1)
