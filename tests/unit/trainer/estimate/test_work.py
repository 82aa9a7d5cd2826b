"""Tokens, FLOPs and time of a run. The expected figures are computed by hand, or by torch's counter of FLOPs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from mulligan.cli.train import read_settings
from mulligan.trainer.algorithms import Played
from mulligan.trainer.estimate.memory import Training
from mulligan.trainer.estimate.shapes import KNOWN, shape_from
from mulligan.trainer.estimate.work import (
    GPUS,
    Flops,
    _pairs,
    seconds,
    sequence_flops,
    step_flops,
    step_tokens,
)
from mulligan.trainer.settings import ALGORITHMS, RunSettings
from tests.support.paths import ROOT

SHAPE = shape_from(KNOWN["Qwen/Qwen3-4B"])
FULL, LORA = Training(), Training(rank=16)


def run_settings(**changes: Any) -> RunSettings:
    rollout = {"tasks_per_step": 3, "rollouts_per_task": 2, "max_tokens": 10, "reflection_max_tokens": 50}
    return RunSettings.model_validate({"environment": "game", "rollout": rollout, **changes})


def test_a_step_of_erl_has_two_attempts_a_reflection_and_a_copy() -> None:
    step = step_tokens(run_settings(), ALGORITHMS.find("erl").PLAYS, turns=4, prompt=100, context=1000)
    assert (step.episodes, step.episode_length, step.answers) == (6 * 3, 100 + 40, 40)
    assert (step.texts, step.text_length, step.text_answers) == (6, 150, 50)
    assert step.trained == 18 * 140 + 6 * 150
    assert step.sampled == 6 * (2 * 40 + 50)
    assert step.longest == 150


def test_a_step_of_rlvr_has_an_attempt_for_each_rollout() -> None:
    step = step_tokens(run_settings(), Played(1), turns=4, prompt=100, context=120)
    assert step.trained == 6 * 120 and step.sampled == 6 * 20, "cut at the context"
    assert step.longest == 120


@pytest.mark.parametrize(("length", "window", "pairs"), [(5, 0, 15), (5, 5, 15), (5, 2, 1 + 2 + 2 + 2 + 2), (5, 1, 5)])
def test_pairs_that_attention_sees(length: int, window: int, pairs: int) -> None:
    assert _pairs(length, window) == pairs


def test_flops_are_those_that_torch_counts() -> None:
    config: dict[str, Any] = {
        "model_type": "qwen3",
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
    }
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=torch.arange(6)[None]).logits
        forward = counter.get_total_flops()
        logits.sum().backward()
    found = sequence_flops(shape_from(config), FULL, 6, 6)
    hidden = 4 * 32 * 2 * (6 * 6 - 21)  # torch multiplies the pairs that causality hides, too
    assert forward == found.forward + hidden
    assert counter.get_total_flops() - forward == found.backward + 2 * hidden


def test_lora_spares_the_gradients_of_the_weights() -> None:
    full, lora = (sequence_flops(SHAPE, training, 1000, 100) for training in (FULL, LORA))
    matrices = 2 * 1000 * 36 * SHAPE.layer_matrices + 2 * 100 * SHAPE.head_parameters
    attention = 4 * 4096 * 36 * 1000 * 1001 / 2
    adapters = 2 * 1000 * LORA.adapter_parameters(SHAPE)
    assert full.forward == matrices + attention and full.backward == 2 * full.forward
    assert lora.forward == matrices + attention + adapters
    assert lora.backward == matrices + 2 * (attention + adapters)
    assert full.recomputed == full.forward - 2 * 100 * SHAPE.head_parameters


def test_a_step_runs_forward_once_more_for_the_kl_and_for_old_log_probabilities() -> None:
    plain, kl = run_settings(loss={"kl_coefficient": 0}), run_settings(algorithm={"optimizer_steps": 2})
    step = step_tokens(plain, Played(2, 1, 1), turns=4, prompt=100, context=1000)
    one = sequence_flops(SHAPE, FULL, 140, 40) * 18 + sequence_flops(SHAPE, FULL, 150, 50) * 6
    assert step_flops(SHAPE, FULL, plain, step) == one
    found = step_flops(SHAPE, Training.of(kl, SHAPE), kl, step)
    assert found == Flops(3 * one.forward, one.backward, one.recomputed)
    as_sampled = run_settings(algorithm={"optimizer_steps": 2, "recompute_log_probs": False})
    found = step_flops(SHAPE, Training.of(as_sampled, SHAPE), as_sampled, step)
    assert found == Flops(2 * one.forward, one.backward, one.recomputed)


@pytest.mark.parametrize("recomputes", [True, False])
@pytest.mark.parametrize(("name", "more"), [("expert_iteration", 0), ("dpo_pairs", 0), ("nft", 1)])
def test_a_step_runs_forward_once_more_where_the_objective_compares_with_an_old_policy(
    name: str, more: int, recomputes: bool
) -> None:
    """As the runs themselves do: the objective of NFT compares with it by the learner's log-probabilities alone."""
    chosen = {"name": name, "optimizer_steps": 2, "recompute_log_probs": recomputes}
    settings = run_settings(algorithm=chosen, loss={"kl_coefficient": 0})
    step = step_tokens(settings, ALGORITHMS.find(name).PLAYS, turns=4, prompt=100, context=1000)
    once = step_flops(SHAPE, FULL, run_settings(algorithm={"name": name}, loss={"kl_coefficient": 0}), step)
    assert step_flops(SHAPE, FULL, settings, step) == Flops((1 + more) * once.forward, once.backward, once.recomputed)


def test_time_is_work_over_the_share_of_the_peak() -> None:
    flops = Flops(forward=100e12, backward=200e12, recomputed=90e12)
    h100 = GPUS["h100"]

    def of(training: Training, gpus: int, checkpointing: bool) -> float:
        return seconds(flops, h100, training, gpus=gpus, utilisation=0.5, checkpointing=checkpointing)

    assert of(FULL, 1, False) == pytest.approx(300 / (989 * 0.5))
    assert of(FULL, 8, True) == pytest.approx(390 / (8 * 989 * 0.5))
    assert of(Training(number=4), 1, False) == pytest.approx(300 / (67 * 0.5))


# https://github.com/PrimeIntellect-ai/prime-rl/tree/main/benchmarks: tokens per second of an H100, with recomputation
@pytest.mark.parametrize(
    ("model", "rank", "tokens", "rate", "utilisation"),
    [
        ("Qwen/Qwen3-4B-Instruct-2507", 16, 16_384, 6229, 0.27),
        ("Qwen/Qwen3-4B-Instruct-2507", 16, 65_536, 4164, 0.42),
        ("Qwen/Qwen3-0.6B", 0, 16_384, 11_896, 0.15),
    ],
)
def test_what_share_of_the_peak_others_reached(
    model: str, rank: int, tokens: int, rate: float, utilisation: float
) -> None:
    training = Training(rank=rank)
    flops = sequence_flops(shape_from(KNOWN[model]), training, tokens, tokens)
    at_peak = seconds(flops, GPUS["h100"], training, gpus=1, utilisation=1, checkpointing=True)
    assert at_peak * rate / tokens == pytest.approx(utilisation, abs=0.01)


def test_the_papers_recipes_have_their_published_lengths() -> None:
    settings = read_settings(ROOT / "recipes" / "frozenlake-paper.toml", [])
    step = step_tokens(settings, Played(2, 1, 1), turns=8, prompt=6114, context=262_144)
    assert step.longest == 16_354
