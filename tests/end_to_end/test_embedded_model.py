"""The embedded model can do what its README says, and its recipe runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mulligan.models import EMBEDDED
from mulligan.models.recipe.measure import FIXED_SYMBOLS, Meter, environment, legend, other_symbols, random_play
from mulligan.models.recipe.sampling import (
    PAPER_VALIDATION,
    Sampling,
    attempt_all,
)
from tests.support.paths import ROOT


@pytest.mark.timeout(600)  # for what hangs, not for a machine that is busy
def test_the_recipe_runs(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "mulligan.models.recipe",
        "--out",
        str(tmp_path),
        "--steps",
        "4",
        "--measure-boards",
        "0",
    ]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "step 4/4" in output
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.model_type == "qwen3"


@pytest.fixture(scope="module")
def meter() -> Meter:
    model: Any = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    return Meter(model, AutoTokenizer.from_pretrained(EMBEDDED), Sampling())


@pytest.mark.long
def test_without_a_legend_the_fixed_assignment_is_as_hard_as_any(meter: Meter) -> None:
    fixed = sum(meter.first_attempts(FIXED_SYMBOLS, seed=seed)[0] for seed in range(5)) / 5
    assert fixed <= 0.35
    assert abs(fixed - random_play(100)) <= 0.05
    few = Meter(meter.model, meter.tokenizer, meter.sampling, boards=25)
    same = sum(few.first_attempts(*[FIXED_SYMBOLS] * 20)) / 20
    others = sum(few.first_attempts(*other_symbols(20), seed=1)) / 20
    assert abs(same - others) <= 3 * (2 * others * (1 - others) / 500) ** 0.5  # three standard errors


def test_a_legend_is_read(meter: Meter) -> None:
    assert meter.with_legend(legend(FIXED_SYMBOLS)) >= 0.8
    assert Meter(meter.model, meter.tokenizer, PAPER_VALIDATION).with_legend(legend(FIXED_SYMBOLS)) >= 0.9
    assert meter.with_shuffled_legends() <= 0.35


def test_reflections_lead_to_success(meter: Meter) -> None:
    empty = meter.second_attempts()
    right = meter.second_attempts(legend(FIXED_SYMBOLS))
    assert empty["second_attempt_success"] >= 0.5
    assert right["legends_entirely_right"] >= empty["legends_entirely_right"] - 0.05
    assert right["second_attempt_success"] >= 0.6


def test_attempts_do_not_depend_on_their_neighbours(meter: Meter) -> None:
    """Left padding and masks must not show: near-greedy play is the same alone and in a batch."""
    lake = environment()
    system = f"{legend(FIXED_SYMBOLS)}\nplay"
    greedy = Sampling(temperature=0.01)
    ids = [f"test/{index:05d}" for index in range(12)]
    tasks = [(lake.start(task_id), system) for task_id in ids]
    together = attempt_all(meter.model, meter.tokenizer, lake.info, tasks, greedy)
    for task_id, attempt in zip(ids, together, strict=True):
        alone = attempt_all(meter.model, meter.tokenizer, lake.info, [(lake.start(task_id), system)], greedy)
        assert alone == [attempt]
