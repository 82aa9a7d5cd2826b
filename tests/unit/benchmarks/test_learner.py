"""The recorded step of ERL that the benchmark of the learner trains on."""

from __future__ import annotations

from benchmarks.learner.batches import ERL_DEMO, recorded
from mulligan.trainer.data import Distillation, ModelLimits, PolicyGradient
from mulligan.trainer.learner.batching import check, length, pack
from mulligan.trainer.learner.prefix_tree import TreeSize, key


def test_the_recorded_step_is_of_erl_and_repeats_itself() -> None:
    data = recorded(ERL_DEMO)
    check(data, ModelLimits(vocabulary_size=1024, context_length=1024))
    assert {type(datum.objective) for datum in data} == {PolicyGradient, Distillation}
    tree = TreeSize()
    for datum in data:
        tree.add(key(datum.token_ids[: length(datum)]))
    assert tree.nodes < 0.5 * sum(map(length, data))
    assert sorted(row for group in pack(data, range(len(data)), 768, sharing=True) for row in group) == list(
        range(len(data))
    )
