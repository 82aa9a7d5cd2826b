"""No environment is given an agent's thoughts, wherever its code runs."""

from __future__ import annotations

from uuid import uuid4

import pytest

from mulligan.common.channel import Endpoint
from mulligan.env.client import EnvClient
from mulligan.testing.processes import ServiceProcesses

DICE = {"kind": "tests.support.dice"}
ANSWERS = {
    "<think>It could be 3, or": "nothing",
    "It could be 3, or\n</think>\n\n4": "4",
    "[THINK]3[/THINK]4": "4",
    "<think>\n<think>3</think>4<think>5": "4",
}


@pytest.mark.parametrize("kind", ["plain", "limited", "untrusted", "chained"])
async def test_what_stands_in_a_thought_is_no_action(shared_services: ServiceProcesses, kind: str) -> None:
    tables = {"plain": DICE, "limited": {**DICE, "feedback": "unary"}, "untrusted": {**DICE, "untrusted": True}}
    server = shared_services.start("env", environments={kind: tables.get(kind, DICE)})
    if kind == "chained":
        remote = {"kind": "remote", "address": server.address}
        server = shared_services.start("env", environments={kind: remote})
    client = EnvClient(Endpoint(server.address))
    for answer, action in ANSWERS.items():
        episode = await client.start(kind, "train/1", str(uuid4()))
        assert (await episode.step(answer)).action == action
        await episode.end()
    await client.close()
