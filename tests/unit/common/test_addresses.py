"""What an address setting may say, and which of several servers an id belongs to."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mulligan.common.addresses import Addresses, DnsName, by_rank, one_server
from mulligan.trainer.config import TrainerSettings
from tests.support.paths import ROOT

IDS = [f"run-{number}" for number in range(4000)]


@pytest.mark.parametrize(
    ("text", "fixed", "names"),
    [
        ("127.0.0.1:50051", ["127.0.0.1:50051"], []),
        ("[::1]:50051", ["[::1]:50051"], []),
        ("unix:/tmp/env.sock", ["unix:/tmp/env.sock"], []),
        ("a:1, b:2", ["a:1", "b:2"], []),
        ("env-0.env:1-3", ["env-0.env:1", "env-0.env:2", "env-0.env:3"], []),
        ("[fe80::1%eth0]:7-8", ["[fe80::1%eth0]:7", "[fe80::1%eth0]:8"], []),
        ("dns:///env:50051", [], [DnsName("env", 50051)]),
        ("dns:env:50051,b:2", ["b:2"], [DnsName("env", 50051)]),
    ],
)
def test_what_an_address_may_be(text: str, fixed: list[str], names: list[DnsName]) -> None:
    found = Addresses.parse(text)
    assert (list(found.fixed), list(found.names), found.text) == (fixed, names, text)
    assert found.single == (len(fixed) == 1 and not names)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a part is empty: expected host:port"),
        ("a:1,,b:2", "a part is empty"),
        ("env", "'env': expected host:port"),
        (":50051", "':50051': expected host:port"),
        ("a b:1", "'a b:1': expected host:port"),
        ("http://a:1", "'http://a:1': expected host:port"),
        ("::1:50051", "'::1:50051': expected host:port"),
        ("a:x", "'a:x': expected a port from 1 to 65535, not 'x'"),
        ("a:0", "not '0'"),
        ("a:65536", "not '65536'"),
        ("a:1-", "not ''"),
        ("a:5-3", "the lower port first"),
        ("a:1-60000", "at most 1000 ports"),
        ("a:1,a:1", "'a:1' is named twice"),
        ("a:1-3,a:2", "'a:2' is named twice"),
        ("dns:///a:1,dns:a:1", "'dns:///a:1' is named twice"),
        ("dns:///a:1-2", "expected one port behind a DNS name"),
        ("dns://9.9.9.9/a:1", "only the system's resolver"),
        ("dns:///a", "expected host:port"),
    ],
)
def test_what_it_may_not_be(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        Addresses.parse(text)


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("env-address", "a:1,b", "env_address: Value error, 'b': expected host:port"),
        ("policy-address", "a:2-1", "policy_address: Value error, 'a:2-1': expected the lower port first"),
        ("memory-address", "a:1,b:2", "memory_address: Value error, 'a:1,b:2' names several servers"),
    ],
)
def test_the_trainer_names_the_setting(flag: str, value: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        TrainerSettings.load([f"--{flag}", value])
    assert said in capsys.readouterr().err


def test_where_one_server_is_meant() -> None:
    assert one_server("a:1") == "a:1"
    for several in ("a:1,b:1", "a:1-2", "dns:///a:1"):
        with pytest.raises(ValueError, match="names several servers"):
            one_server(several)


async def test_names_are_looked_up() -> None:
    found = await Addresses.parse("dns:///localhost:7,b:2").look_up()
    assert found[0] == "b:2" and {"127.0.0.1:7", "[::1]:7"} >= set(found[1:]) != set()
    with pytest.raises(OSError, match=r"dns:///no-such-name\.invalid:7: "):
        await Addresses.parse("dns:///no-such-name.invalid:7").look_up()


Servers = st.lists(st.from_regex(r"[a-z]{1,8}:[1-9][0-9]{0,3}", fullmatch=True), min_size=2, max_size=8, unique=True)


@given(st.text(), Servers, st.randoms())
def test_a_server_that_goes_moves_only_its_own_ids(key: str, servers: list[str], chance: object) -> None:
    order = by_rank(key, servers)
    assert sorted(order) == sorted(servers) and order == by_rank(key, reversed(servers))
    for gone in servers:
        assert by_rank(key, [server for server in servers if server != gone]) == [s for s in order if s != gone]


@pytest.mark.parametrize("count", [2, 3, 8])
def test_ids_spread_evenly(count: int) -> None:
    servers = Addresses.parse(f"127.0.0.1:50051-{50050 + count}").fixed
    for rank in (0, 1):  # the first choice, and where an id goes when that one is away
        chosen = Counter(by_rank(key, servers)[rank] for key in IDS)
        share = len(IDS) / count
        assert all(0.85 * share < chosen[server] < 1.15 * share for server in servers)


def test_all_processes_agree() -> None:
    chosen = "[by_rank(f'run-{i}', ['a:1', 'b:2', 'c:3']) for i in range(9)]"
    code = f"from mulligan.common.addresses import by_rank; print({chosen})"
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert found == {f"{[by_rank(f'run-{i}', ['c:3', 'b:2', 'a:1']) for i in range(9)]}\n"}
