"""What the proof in containers runs inside of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mulligan.common.channel import Endpoint
from mulligan.common.tls import ClientTls
from mulligan.policy import client
from proof.docker import VERSION


def test_the_version_of_a_replica_is_asked_for_over_tls(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its server speaks nothing else (docker/compose.yaml)."""
    asked: list[Endpoint] = []

    class Replica:
        policy_version = 7

        def __init__(self, endpoint: Endpoint) -> None:
            asked.append(endpoint)

        async def info(self, policy: str) -> Any:
            return self

    monkeypatch.setattr(client, "PolicyClient", Replica)
    exec(VERSION, {})
    assert capsys.readouterr().out == "7\n"
    assert asked[0].tls == ClientTls(ca=Path("/run/tls/ca.crt")) and asked[0].token_file == Path("/run/tokens/reader")
