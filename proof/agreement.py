"""SGLang and the trainer's own forward pass agree on the same weights, before and after ten updates."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mulligan.common.channel import Endpoint
from mulligan.common.inference import WeightsKind
from mulligan.policy.client import PolicyClient
from mulligan.testing.agreement import MOVED, TOLERANCE, Compared, assert_agreement, compare_while_training
from mulligan.testing.processes import ServiceProcesses
from mulligan.testing.sglang_servers import LAUNCH_SECONDS, launch_settings, python_of_sglang
from proof import CaseUnavailable

UPDATES = 10
SEQUENCES = 64


def agree(kind: WeightsKind, folder: Path) -> dict[str, Any]:
    """The policy service starts one SGLang server; the learner takes ten optimizer steps on its samples."""
    if not python_of_sglang():
        raise CaseUnavailable("MULLIGAN_TEST_SGLANG_PYTHON: the interpreter of an environment with SGLang")
    if folder.exists():
        shutil.rmtree(folder)
    (folder / "weights").mkdir(parents=True)
    services = ServiceProcesses(folder)
    try:
        process = services.start(
            "policy",
            start_seconds=LAUNCH_SECONDS,
            backend="sglang",
            model="embedded",
            sglang=launch_settings(),
            weights_folder=folder / "weights",
            state_folder=folder / "state",
        )
        results = asyncio.run(_compare(process.address, kind, folder))
        assert process.stop() == 0, process.log
    finally:
        services.end()
    assert_agreement(results)
    return {
        "kind": str(kind),
        "dtype": "float32",
        "tolerance": TOLERANCE,
        "least_change_asked_of_an_update": MOVED,
        "sampled_tokens": sum(one.tokens for one in results),
        "greatest_difference_sampled": max(one.sampled for one in results),
        "greatest_difference_scored": max(one.scored for one in results),
        "greatest_difference_canary": max(one.canary or 0.0 for one in results),
        "versions": [
            {
                "policy_version": one.policy_version,
                "sampled": one.sampled,
                "scored": one.scored,
                "canary": one.canary,
                "changed_by_the_update": one.moved,
            }
            for one in results
        ],
    }


async def _compare(address: str, kind: WeightsKind, folder: Path) -> list[Compared]:
    client = PolicyClient(Endpoint(address))
    try:
        return await compare_while_training(client, kind, folder, updates=UPDATES, sequences=SEQUENCES)
    finally:
        await client.close()


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    f"agreement-{kind}": partial(agree, kind) for kind in (WeightsKind.FULL, WeightsKind.LORA)
}
