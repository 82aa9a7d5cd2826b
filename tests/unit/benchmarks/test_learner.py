"""The recorded steps of ERL that the benchmark of the learner trains on, and what TRL is given of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.learner import __main__ as main
from benchmarks.learner import rollouts
from benchmarks.learner.batches import ERL_DEMO, ERL_DEMO_LM, recorded
from benchmarks.learner.with_trl import inputs
from mulligan.trainer.data import Distillation, ModelLimits, PolicyGradient
from mulligan.trainer.learner.batching import check, length, pack
from mulligan.trainer.learner.prefix_tree import TreeSize, key

WAYS = (main.TRL, main.BARE, main.OURS, main.SEPARATE, main.STEPPED, main.REMOTE)


@pytest.mark.parametrize(("file", "vocabulary", "unique"), [(ERL_DEMO, 1024, 0.5), (ERL_DEMO_LM, 49_152, 0.6)])
def test_the_recorded_steps_are_of_erl_and_repeat_themselves(file: Path, vocabulary: int, unique: float) -> None:
    data = recorded(file)
    check(data, ModelLimits(vocabulary, context_length=1024))
    assert {type(datum.objective) for datum in data} == {PolicyGradient, Distillation}
    tree = TreeSize()
    for datum in data:
        tree.add(key(datum.token_ids[: length(datum)]))
    assert tree.nodes < unique * sum(map(length, data))
    assert sorted(row for group in pack(data, range(len(data)), 768, sharing=True) for row in group) == list(
        range(len(data))
    )


def test_trl_is_given_the_same_tokens_and_trains_the_same_of_them() -> None:
    data = recorded(ERL_DEMO)[:20]
    given = inputs(data)
    ids_BT = torch.cat([given["prompt_ids"], given["completion_ids"]], 1)
    seen_BT = torch.cat([given["prompt_mask"], given["completion_mask"]], 1).bool()
    trained_BC = (given["completion_mask"] * given["tool_mask"]).bool()
    for row, datum in enumerate(data):
        assert tuple(ids_BT[row][seen_BT[row]].tolist()) == datum.token_ids
        trained = [token for token, mask in zip(datum.token_ids, datum.loss_mask, strict=True) if mask]
        assert given["completion_ids"][row][trained_BC[row]].tolist() == trained
    assert given["num_items_in_batch"] == sum(sum(datum.loss_mask) for datum in data)


def test_the_ratio_of_grpc_is_of_equal_work() -> None:
    """Both sides take the optimizer's step."""
    rates = {way: [float(rate)] for way, rate in zip(WAYS, (10, 20, 40, 20, 32, 24), strict=True)}
    found = main.report({"erl-demo": rates}, dict.fromkeys(main.PEAKS, 1))
    assert (found["grpc_ratio"], found["bare_ratio"], found["prefix_ratio"]) == (0.75, 2.0, 2.0)


def test_the_ratios_of_memory_are_of_a_step_of_all_weights() -> None:
    rates = {way: [1.0] for way in WAYS}
    memory = {main.FULL: 20, main.LORA: 15, main.CHECKPOINTING: 8, main.TRL_FULL: 40}
    found = main.report({"erl-demo": rates}, memory)
    names = ("lora_memory_ratio", "lora_checkpointing_memory_ratio", "trl_memory_ratio")
    assert [found[name] for name in names] == [0.75, 0.4, 0.5]


def test_whole_trainings_are_compared_round_by_round() -> None:
    found = {
        rollouts.OURS: [20.0, 90.0, 60.0],
        rollouts.TRL: [10.0, 30.0, 30.0],
        rollouts.OVERLAPPING: [30.0, 60.0, 90.0],
        rollouts.AS_SAMPLED: [15.0, 75.0, 75.0],
        rollouts.BOTH: [40.0, 90.0, 120.0],
    }
    assert rollouts.report(found) == {
        "trl_rollouts_ratio": 2.0,
        "trl_rollouts_overlapping_ratio": 3.0,
        "trl_rollouts_as_sampled_ratio": 2.5,
        "trl_rollouts_both_ratio": 4.0,
        "rollouts_per_second": 60.0,
        "trl_rollouts_per_second": 30.0,
    }


def test_a_measured_training_plays_each_of_its_boards_once() -> None:
    settings = rollouts.settings_of(4)
    assert settings.rollout.train_tasks == settings.steps * settings.rollout.tasks_per_step
    assert settings.evaluation.every == 0
    assert rollouts.overlapping(settings).rollout.max_staleness == 1
    assert settings.algorithm.recompute_log_probs
    assert not rollouts.as_sampled(settings).algorithm.recompute_log_probs
