"""The trainer's own forward pass and a real SGLang server give the same log-probabilities, before and after updates.

The long case is `python -m proof --only agreement`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from mulligan.common.inference import WeightsKind
from mulligan.testing.agreement import assert_agreement, compare_while_training
from tests.support.policy_backends import restore, running


@pytest.mark.parametrize("kind", [WeightsKind.FULL, WeightsKind.LORA])
async def test_sglang_agrees_with_the_trainer_while_it_trains(kind: WeightsKind, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    try:
        async with running("sglang", weights_folder=tmp_path / "weights") as policy:
            results = await compare_while_training(policy.client, kind, tmp_path, updates=2, sequences=6)
    finally:
        await restore("sglang")
    assert [one.policy_version for one in results] == [0, 1, 2]
    assert all(one.canary is not None for one in results[1:])
    assert_agreement(results)
