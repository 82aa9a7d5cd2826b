"""Weights of the branches, and how a step's data are dealt out over its optimizer steps."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import fsum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mulligan.common.experience import (
    Experience,
    ForkPoint,
    Sample,
    Segment,
    SegmentKind,
    TokenSequence,
    TrainingTarget,
    Turn,
)
from mulligan.common.types import Outcome
from mulligan.trainer.advantages import Advantage, Return
from mulligan.trainer.aggregation import Aggregation
from mulligan.trainer.algorithms.erl import BranchNormalization, Settings, train
from mulligan.trainer.batch import (
    advantages,
    divergence,
    groups_of,
    imitation,
    minibatches,
    number_trained,
    preference,
    rest_of,
    returns,
    rewarded,
    rewards_before,
    transfer,
    with_reward,
)
from mulligan.trainer.data import Datum, Distillation, ModelLimits, PolicyGradient, datum_problem
from mulligan.trainer.objectives.divergence import Divergence
from mulligan.trainer.objectives.preference import Preference
from mulligan.trainer.objectives.transfer import Transfer


def datum(branch: str, number: int, weight: float) -> Datum:
    objective = Distillation(1.0) if branch == "distilled" else PolicyGradient(1.0, (-0.5,))
    return Datum(f"{branch}-{number}", (1, 2), (False, True), weight, 1.0, objective, branch)


def step_data(sizes: dict[str, int], weights: dict[str, float]) -> list[Datum]:
    return [datum(branch, number, weights[branch]) for branch, size in sizes.items() for number in range(size)]


SIZES = st.fixed_dictionaries({branch: st.integers(0, 40) for branch in ("first", "second", "distilled")})
WEIGHTS = st.fixed_dictionaries({branch: st.floats(0.01, 10) for branch in ("first", "second", "distilled")})


@given(SIZES, WEIGHTS, st.integers(1, 12), st.integers(0, 5))
def test_every_optimizer_step_sees_every_branch_at_the_weight_of_the_whole_batch(
    sizes: dict[str, int], weights: dict[str, float], count: int, seed: int
) -> None:
    data = step_data(sizes, weights)
    dealt = minibatches(data, count, seed)
    assert len(dealt) == max(1, min(count, len(data)))
    for minibatch in dealt:
        for branch, size in sizes.items():
            seen = [datum.weight for datum in minibatch if datum.branch == branch]
            assert fsum(seen) == pytest.approx(size * weights[branch])
            assert len({datum.datum_id for datum in minibatch}) == len(minibatch), "no datum twice in a step"
    totals: dict[str, float] = defaultdict(float)
    for minibatch in dealt:
        for item in minibatch:
            totals[item.datum_id] += item.weight
    assert totals == pytest.approx({item.datum_id: item.weight * len(dealt) for item in data})


@given(st.lists(st.tuples(st.sampled_from(["first", "second"]), st.floats(0.01, 10)), max_size=40), st.integers(1, 12))
def test_data_of_different_weights_are_dealt_out_in_equal_numbers(drawn: list[tuple[str, float]], count: int) -> None:
    """A step has as many data of a branch as any other, and the steps' mean is the whole batch."""
    data = [datum(branch, number, weight) for number, (branch, weight) in enumerate(drawn)]
    whole = {item.datum_id: item.weight for item in data}
    dealt = minibatches(data, count, 0)
    for minibatch in dealt:
        shares: dict[str, float] = defaultdict(float)
        for item in minibatch:
            shares[item.branch] += item.weight / whole[item.datum_id]
        assert shares == pytest.approx(Counter(item.branch for item in data))
    totals: dict[str, float] = defaultdict(float)
    for minibatch in dealt:
        for item in minibatch:
            totals[item.datum_id] += item.weight / len(dealt)
    assert totals == pytest.approx(whole)


@pytest.mark.parametrize("step", range(3))
def test_a_step_of_different_weights_is_the_whole_batch_on_average(step: int) -> None:
    """Over the seeds each datum has its own weight in each step, however large it is."""
    weights = [9.0, 1.0, 0.1, 4.0, 4.0]
    data = [datum("first", number, weight) for number, weight in enumerate(weights)]
    sums: dict[str, float] = defaultdict(float)
    for seed in range(2000):
        for item in minibatches(data, 3, seed)[step]:
            sums[item.datum_id] += item.weight / 2000
    assert sums == pytest.approx({item.datum_id: item.weight for item in data}, rel=0.1)


def test_where_a_branch_stands_depends_on_the_seed_and_not_on_sizes() -> None:
    """30, 3 and 2 data over 8 steps: no step goes without a branch, and others are neighbours under another seed."""
    data = step_data({"first": 30, "second": 3, "distilled": 2}, {"first": 1 / 30, "second": 1 / 3, "distilled": 2.0})
    orders = set()
    for seed in range(10):
        dealt = minibatches(data, 8, seed)
        for minibatch in dealt:
            assert Counter(item.branch for item in minibatch).keys() == {"first", "second", "distilled"}
        orders.add(tuple(item.datum_id for item in dealt[0] if item.branch == "second"))
        sizes = [len(minibatch) for minibatch in dealt]
        assert max(sizes) - min(sizes) <= 3
    assert len(orders) > 1
    assert minibatches(data, 8, 3) == minibatches(data, 8, 3)


def sequence() -> tuple[TokenSequence, ...]:
    prompt = Segment(SegmentKind.PROMPT, (1, 2))
    return (TokenSequence((prompt, Segment(SegmentKind.SAMPLED, (3, 4), (-0.5, -0.5), ()))),)


def attempt(name: str, role: str, reward: float | None) -> Sample:
    outcome = Outcome.ENV_ERROR if reward is None else Outcome.COMPLETED
    return Sample(f"{name}-{role}", role, outcome, sequence(), 0.7, reward, episode_id=f"{name}-{role}")


def chain(number: int, first: float | None, second: float | None = None, *, lost: bool = False) -> Experience:
    """A chain whose failing first attempt led to a reflection and a second attempt; `lost`: that one has no reward."""
    name = f"run-s0-t{number // 4}-r{number % 4}"
    experience = Experience(name, "run", 0, "env", "task", number % 4, (attempt(name, "first", first),))
    if second is None and not lost:
        return experience
    reflection = Sample(f"{name}-reflection", "reflection", Outcome.COMPLETED, sequence(), 0.5, second, text="rule")
    retried = attempt(name, "second", second)
    targets = (TrainingTarget(f"{name}-distilled", "distilled", retried.sample_id, sequence()),) if second else ()
    return replace(experience, samples=(*experience.samples, reflection, retried), targets=targets)


def branch_weights(experiences: Sequence[Experience], normalization: BranchNormalization) -> dict[str, float]:
    """Sum of the weights of each branch's data."""
    settings = Settings(branch_normalization=normalization)
    sums: dict[str, float] = defaultdict(float)
    for item in train(groups_of(experiences), settings):
        sums[item.branch] += item.weight
    return dict(sums)


def test_a_branch_keeps_its_weight_when_a_quarter_of_it_is_lost() -> None:
    """Of 16 chains 8 fail at first; half of their second attempts succeed. Then two of the eight are lost."""
    solved = [chain(number, 1.0) for number in range(8)]
    whole = solved + [chain(8 + number, 0.0, float(number % 2)) for number in range(8)]
    lossy = solved + [chain(8 + number, 0.0, float(number % 2), lost=number >= 6) for number in range(6)]
    lossy += [chain(14 + number, 0.0, lost=True) for number in range(2)]
    expected = {"first": 1.0, "reflection": 0.5, "second": 0.5, "distilled": 0.25}
    assert branch_weights(whole, BranchNormalization.CHAINS) == pytest.approx(expected)
    assert branch_weights(whole, BranchNormalization.TRAINABLE) == pytest.approx(expected)
    assert branch_weights(lossy, BranchNormalization.CHAINS)["second"] == pytest.approx(6 / 16)
    assert branch_weights(lossy, BranchNormalization.TRAINABLE) == pytest.approx(expected)


def test_a_lost_first_attempt_and_a_distilled_copy_that_cannot_be_trained_on_take_no_weight_away() -> None:
    chains = [chain(0, None), chain(1, 1.0), chain(2, 0.0, 1.0), replace(chain(3, 0.0, 1.0), targets=())]
    expected = {"first": 1.0, "reflection": 2 / 3, "second": 2 / 3, "distilled": 2 / 3}
    assert branch_weights(chains, BranchNormalization.TRAINABLE) == pytest.approx(expected)


@pytest.mark.parametrize("normalization", list(BranchNormalization))
def test_a_step_in_which_everything_was_lost_has_no_data(normalization: BranchNormalization) -> None:
    assert branch_weights([chain(number, None) for number in range(4)], normalization) == {}
    assert branch_weights([], normalization) == {}


def test_every_branch_is_trained_at_the_temperature_that_it_was_sampled_at() -> None:
    data = train([[chain(0, 0.0, 1.0)]], Settings())
    assert {item.branch: item.temperature for item in data} == {
        "first": 0.7,
        "reflection": 0.5,
        "second": 0.7,
        "distilled": 0.7,
    }


def test_an_episode_can_be_given_other_rewards_than_its_environments() -> None:
    turns = (Turn("a", "x", "X", 0.0), Turn("b", "y", "invalid", 1.0), Turn("c", "z", "z (invalid)", 0.0))
    episode = replace(attempt("a", "first", 1.0), turns=turns)
    shaped = rewarded(episode, [0.0, -0.25, 0.5])
    assert shaped.reward == 0.25 and [turn.reward for turn in shaped.turns] == [0.0, -0.25, 0.5]
    assert [turn.is_invalid for turn in shaped.turns] == [False, True, True]
    assert replace(shaped, reward=1.0, turns=turns) == episode, "nothing else changes"
    with pytest.raises(ValueError, match="argument 2"):
        rewarded(episode, [1.0])


@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_samples_and_targets_are_imitated_without_their_log_probabilities(aggregation: Aggregation) -> None:
    settings = Settings(aggregation=aggregation, aggregation_constant=4)
    per_turn = replace(attempt("b", "first", 1.0), sequences=sequence() * 2)
    target = TrainingTarget("a-other", "other", "a-first", sequence())
    foreign = replace(attempt("c", "first", 1.0), policy="wise")
    own = attempt("a", "first", 1.0)
    targets: list[tuple[TrainingTarget | Sample, float]] = [(own, 0.7), (target, 0.5), (per_turn, 0.7), (foreign, 0.7)]
    data = imitation(targets, settings, 0.5, "kept")
    assert [item.datum_id for item in data] == ["a-first", "a-other", "b-first.0", "b-first.1"]
    assert [item.temperature for item in data] == [0.7, 0.5, 0.7, 0.7]
    assert {item.objective for item in data} == {Distillation(1.0)} and {item.branch for item in data} == {"kept"}
    factor = {"sequence_mean_token_sum": 1, "sequence_mean_token_mean": 1 / 2, "token_mean": 1 / 2, "constant": 1 / 4}
    assert [item.weight for item in data] == pytest.approx([0.5 * factor[aggregation]] * 4)
    assert not any(datum_problem(item, ModelLimits(10, 10)) for item in data)


@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_all_branches_of_erl_are_summed_as_asked(aggregation: Aggregation) -> None:
    """Each sequence has two trained tokens; each branch weighs 1."""
    groups = [[chain(0, 0.0, 1.0), chain(1, 0.0, 0.5)]]
    factor = {"sequence_mean_token_sum": 1, "sequence_mean_token_mean": 1 / 2, "token_mean": 1 / 2, "constant": 1 / 4}
    data = train(groups, Settings(aggregation=aggregation, aggregation_constant=4))
    assert Counter(item.branch for item in data) == dict.fromkeys(("first", "reflection", "second", "distilled"), 2)
    assert [item.weight for item in data] == pytest.approx([0.5 * factor[aggregation]] * 8)


def test_improvements_are_over_the_sample_that_the_experience_began_with() -> None:
    groups = [[chain(0, 0.25, 1.0), chain(1, None), chain(2, 1.0)]]
    assert rewards_before(groups) == {"run-s0-t0-r0-reflection": 0.25, "run-s0-t0-r0-second": 0.25}
    settings = Settings(advantage="improvement", advantage_settings={"base": "raft"})
    data = train(groups, settings)
    found = {item.datum_id: item.objective.advantage for item in data if isinstance(item.objective, PolicyGradient)}
    assert found == {
        "run-s0-t0-r0-first": 0.25,
        "run-s0-t0-r2-first": 1.0,
        "run-s0-t0-r0-reflection": 0.75,
        "run-s0-t0-r0-second": 0.75,
    }


def test_the_turns_of_an_episode_that_cannot_be_trained_on_count_in_its_group() -> None:
    turns = (Turn("a", "x", "X", 0.5), Turn("b", "y", "Y", 0.25))
    lost = replace(attempt("a", "first", 0.75), turns=turns, sequences=())
    assert returns(lost) == Return(0.75, (0.5, 0.25), (0, 0))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("[[0.5]]", r"expected groups of \[2\] samples, got \[1\]"),
        ("[[0.5, 0.5], []]", r"expected groups of \[2\] samples, got \[2, 0\]"),
        ("[[0.5, (0.5,)]]", "expected one number per sampled token of a sample, 2, got 1"),
        ("[[(0.5, 0.5, 0.5), 0.5]]", "expected one number per sampled token of a sample, 2, got 3"),
        ("[[[0.5], 0.5]]", "expected one number per sampled token of a sample, 2, got 1"),
        ("[[0.5, None]]", "expected a number or one per sampled token, got None"),
        ("[[0.5, '0.5']]", "expected a number or one per sampled token, got '0.5'"),
        ("[[0.5, {1: 2, 3: 4}]]", "expected a number or one per sampled token, got {1: 2, 3: 4}"),
        ("[[0.5, [[1.0], [2.0]]]]", r"expected a number or one per sampled token, got \[\[1.0\], \[2.0\]\]"),
        ("[[numpy.ones((2, 2)), 0.5]]", "expected a number or one per sampled token, got array"),
        ("[[0.5, 1j]]", "expected a number or one per sampled token, got 1j"),
        ("None", "raised TypeError: 'NoneType' object is not iterable"),
        ("[0.5]", "raised TypeError: 'float' object is not iterable"),
        ("groups[9]", "raised IndexError: list index out of range"),
        ("([1 / 0 for _ in group] for group in groups)", "raised ZeroDivisionError: division by zero"),
    ],
)
def test_advantages_of_another_shape_are_refused(given: str, words: str, estimator: Callable[[str], str]) -> None:
    name = estimator(given)
    group = [attempt("a", "first", 1.0), attempt("b", "first", 0.0)]
    with pytest.raises(ValueError, match=f"advantage estimator '{name}':? {words}"):
        advantages([group], Settings(advantage=name))
    over = {"base": name}
    with pytest.raises(ValueError, match=f"advantage estimator '{name}':? {words}"):
        advantages([group], Settings(advantage="over_turn", advantage_settings=over))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("[[0.5, 1]]", [[0.5, 1.0]]),
        ("[[True, [1, 2]]]", [[1.0, (1.0, 2.0)]]),
        ("[[numpy.float32(0.5), numpy.int64(1)]]", [[0.5, 1.0]]),
        ("[[numpy.array(0.5), numpy.array([0.5, 1], 'float32')]]", [[0.5, (0.5, 1.0)]]),
        ("numpy.array([[0.5, 1]])", [[0.5, 1.0]]),
        ("numpy.array([[[0.5, 1], [2, 3]]])", [[(0.5, 1.0), (2.0, 3.0)]]),
        ("(iter((0.5, 1)) for _ in groups)", [[0.5, 1.0]]),
        ("[[fractions.Fraction(1, 2), (one for one in (1, 2))]]", [[0.5, (1.0, 2.0)]]),
    ],
)
def test_numbers_and_arrays_of_other_libraries_are_advantages(
    given: str, expected: Any, estimator: Callable[[str], str]
) -> None:
    group = [attempt("a", "first", 1.0), attempt("b", "first", 0.0)]
    found = advantages([group], Settings(advantage=estimator(given)))
    assert repr(found) == repr(expected), "plain numbers, which a journal takes"


@pytest.fixture
def estimator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Makes an estimator of another package that returns an expression; its name."""

    def made(given: str) -> str:
        (tmp_path / "misshapen.py").write_text(
            "import fractions\n\nimport numpy\n\nfrom mulligan.common.plugins import PluginSettings\n\n\n"
            "class Settings(PluginSettings):\n    pass\n\n\n"
            f"def estimate(groups, settings):\n    return {given}\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "misshapen", raising=False)
        return "misshapen"

    return made


def other(identity: str) -> TrainingTarget:
    """The tokens of `sequence()` under a longer prompt."""
    return TrainingTarget(identity, "other", "a-first", (sequence()[0].with_prompt((1, 2, 3)),))


@pytest.mark.parametrize("advantage", [0.5, (0.5, -0.25)])
def test_a_target_is_trained_with_an_advantage_in_its_own_context(advantage: Advantage) -> None:
    source = replace(attempt("a", "first", 1.0), temperature=0.7)
    [datum] = transfer(other("a-other"), source, advantage, 0.25, "b", shape=0.1)
    assert (datum.datum_id, datum.weight, datum.temperature, datum.branch) == ("a-other", 0.25, 0.7, "b")
    assert datum.token_ids[:3] == (1, 2, 3)
    one, several = (0.0, advantage) if isinstance(advantage, tuple) else (advantage, ())
    assert datum.objective == Transfer(one, 0.1, advantages=several)
    [datum] = transfer(other("a-other"), source, 0.5, 0.25, "b", ratio=True)
    assert datum.objective == Transfer(0.5, ratio=1.0)


def test_a_teacher_is_the_same_tokens_in_another_context() -> None:
    sample = attempt("a", "first", 1.0)
    [datum] = divergence(sample, other("a-teacher"), 0.5, 0.25, "taught")
    assert isinstance(datum.objective, Divergence) and datum.datum_id == "a-first"
    assert datum.token_ids == tuple(sequence()[0].token_ids)
    assert datum.objective.teacher.token_ids[:3] == (1, 2, 3) and datum.objective.beta == 0.5
    assert datum_problem(datum, ModelLimits(10, 10)) is None, "the trained tokens are the same"


def test_a_pair_is_of_two_single_sequences_of_the_trained_policy() -> None:
    sample = attempt("a", "first", 0.0)
    [datum] = preference(other("a-better"), sample, 0.1, 0.2, 0.5, "pairs")
    assert isinstance(datum.objective, Preference) and (datum.datum_id, datum.weight) == ("a-better", 0.5)
    assert datum.objective.rejected.token_ids == tuple(sequence()[0].token_ids)
    assert (datum.objective.beta, datum.objective.ftx) == (0.1, 0.2)
    for bad in (
        replace(sample, policy="wise"),
        replace(sample, sequences=()),
        replace(sample, sequences=sequence() * 2),
    ):
        assert preference(other("a-better"), bad, 0.1, 0.2, 0.5, "pairs") == []


def test_the_rest_of_an_episode_carries_loss_from_a_turn_on() -> None:
    """Two turns of one token each; the reward of the second is 0.25."""
    turns = (Turn("a", "x", "X", 0.5), Turn("b", "y", "Y", 0.25))
    kinds = [SegmentKind.PROMPT, SegmentKind.SAMPLED, SegmentKind.ENVIRONMENT, SegmentKind.SAMPLED]
    segments = tuple(Segment(kind, (place,), (-1.0,) * (place % 2)) for place, kind in enumerate(kinds))
    episode = replace(attempt("a", "first", 0.75), turns=turns, sequences=(TokenSequence(segments),))
    rest = rest_of(episode, 1)
    assert rest.reward == 0.25 and rest.turns == turns[1:] and rest.sequences[0].token_ids == [0, 1, 2, 3]
    assert rest.sequences[0].loss_mask == [False, False, False, True] and rest.sequences[0].log_probs == [-1.0]
    assert rest_of(episode, 0) == episode and rest_of(episode, 2).sequences == ()
    fork = replace(episode, forked_from=ForkPoint("e", 3))
    assert rest_of(fork, 4) == replace(rest, forked_from=fork.forked_from), "the turn counts from the start of the task"


def test_samples_of_a_role_that_have_a_reward_and_those_with_tokens() -> None:
    samples = [
        attempt("a", "first", 1.0),
        replace(attempt("b", "first", 0.0), reward=None),
        attempt("c", "second", 0.0),
    ]
    group = [Experience(one.sample_id, "run", 0, "fake", "t0", 0, (one,)) for one in samples]
    assert with_reward([group, []], "first") == [[samples[0]], []]
    assert number_trained([samples, []]) == 3 and number_trained([[]]) == 1
    assert number_trained([[replace(samples[0], sequences=()), replace(samples[0], policy="wise")], samples]) == 3
