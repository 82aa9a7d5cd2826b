"""A learner in two processes: it learns what one process learns, and their checkpoints are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mulligan.common.inference import PublishedWeights
from tests.support import ranked
from tests.support.tiny_model import write_tiny_model

pytestmark = pytest.mark.long  # test_ranks.py has the short case
STATE = "state "


class Learned(NamedTuple):
    """Of one mode. `of_one` is what one process published after it had loaded and saved what two had saved, and
    `by_one` its state then; `again` is the state of two processes that loaded that."""

    folder: Path
    lora: bool
    by_two: dict[str, Tensor]
    metrics: list[dict[str, float]]
    of_one: PublishedWeights
    by_one: dict[str, Tensor]
    again: dict[str, Tensor]


@pytest.fixture(scope="module")
def by_mode(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Learned]:
    """Two processes are started twice for both modes, as their start takes longest."""
    place = tmp_path_factory.mktemp("ranks")
    for mode in ranked.MODES:
        (place / mode).mkdir()
        write_tiny_model(place / mode / "tiny")
    ranked.by_torchrun(ranked.__name__, "learn", place)
    alone = {mode: _reshard(place / mode, mode == "lora") for mode in ranked.MODES}
    ranked.by_torchrun(ranked.__name__, "reshard", place)
    return {
        mode: Learned(
            place / mode,
            mode == "lora",
            load_file(place / mode / "learn.safetensors"),
            json.loads((place / mode / "learn.json").read_text()),
            *alone[mode],
            load_file(place / mode / "reshard.safetensors"),
        )
        for mode in ranked.MODES
    }


def _reshard(folder: Path, lora: bool) -> tuple[PublishedWeights, dict[str, Tensor]]:
    with ranked.in_float64():
        learner = ranked.make(folder, lora)
        assert learner.load_checkpoint("of-two").next_sequence == 7
        by_one = ranked.state(learner)
        learner.save_checkpoint("of-one", 7)
        return learner.publish_weights(2), by_one


@pytest.fixture(params=ranked.MODES)
def learned(request: pytest.FixtureRequest, by_mode: dict[str, Learned]) -> Learned:
    """What two processes learned and saved."""
    return by_mode[request.param]


def test_two_processes_learn_what_one_learns(learned: Learned) -> None:
    """From data of unequal lengths, and from fewer data than processes."""
    with ranked.in_float64():
        learner = ranked.make(learned.folder, learned.lora)
        expected, metrics = ranked.learn(learner)
    names = {name for name in learned.by_two if not name.startswith(STATE)}
    assert names == expected.keys()
    for name, value in expected.items():
        tolerance = 1e-6 if value.dtype == torch.float32 else 1e-9
        difference = (learned.by_two[name] - value).abs().max().item()
        assert difference <= tolerance * value.abs().max().item(), name
    assert len(metrics) == len(learned.metrics) - 1
    for found, wanted in zip(learned.metrics, metrics, strict=False):
        for one in (found, wanted):
            one.pop("computed_tokens", None)  # two processes may compute a prefix that one computes once
        assert found == pytest.approx(wanted, rel=1e-6, abs=1e-12)


def test_checkpoints_go_from_two_processes_to_one_and_back(learned: Learned) -> None:
    """Exactly: weights, reference and optimizer, and the files themselves."""
    checkpoints = learned.folder / "checkpoints" / "learner"
    by_one = learned.by_one
    by_two = {name.removeprefix(STATE): v for name, v in learned.by_two.items() if name.startswith(STATE)}
    again = {name.removeprefix(STATE): v for name, v in learned.again.items()}
    assert by_one.keys() == by_two.keys() == again.keys()
    assert any(name.startswith("exp_avg_sq") for name in by_one) and any("reference" in name for name in by_one)
    for name, value in by_one.items():
        assert torch.equal(by_two[name], value) and torch.equal(again[name], value), name
    files = {
        name: {path.name for path in (checkpoints / name).iterdir() if not path.name.startswith("random-")}
        for name in ("of-two", "of-one", "of-two-again")
    }
    assert files["of-two"] == files["of-one"] == files["of-two-again"], "their names are their checksums"
    probes = learned.metrics[-1]
    for place, probe in enumerate(learned.of_one.canary):
        assert [probes[f"probe {place} {n}"] for n in range(len(probe.log_probs))] == pytest.approx(
            list(probe.log_probs), rel=1e-5
        )


def test_what_two_processes_publish_is_what_one_publishes(learned: Learned) -> None:
    with ranked.in_float64():
        learner = ranked.make(learned.folder, learned.lora)
        learner.load_checkpoint("of-two")
        learner.publish_weights(3)
    weights = learned.folder / "weights"
    name = "{}/adapter_model.safetensors" if learned.lora else "{}.safetensors"
    one, two = (weights / name.format(f"learner-v{version:06d}") for version in (3, 1))
    assert one.read_bytes() == two.read_bytes()
