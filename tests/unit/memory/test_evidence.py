"""Evidence on entries: what the specification asks of it in simulations, and what its method promises of every use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mulligan.memory.draw import draw
from mulligan.memory.evidence import _BETS, _LOG_SHARES, ALPHA, Evidence, score
from tests.support.effort import examples

Use = tuple[float, bool, float]  # reward, shown, p_out

LIMIT = math.log(2 / ALPHA)
REWARDS = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))
SHARES = st.one_of(st.sampled_from([0.5, 0.25, 0.0625]), st.floats(0, 1, exclude_min=True, exclude_max=True))
# The plain formula divides by p_out.
MODERATE = st.lists(st.tuples(REWARDS, st.booleans(), st.floats(1e-6, 1 - 1e-6)), max_size=60)
USES = st.lists(st.tuples(REWARDS, st.booleans(), SHARES), max_size=60)


def after(uses: Sequence[Use]) -> Evidence:
    evidence = Evidence()
    for reward, shown, p_out in uses:
        evidence.add(reward, shown=shown, p_out=p_out)
    return evidence


def plain_log_capital(uses: Sequence[Use], uplift: float, side: int) -> float:
    """The formula at the top of the module, without any of its sums."""
    capitals = np.exp(_LOG_SHARES)
    shown_sum = left_sum = shown_count = left_count = 0.0
    for reward, shown, p_out in uses:
        pooled = (shown_sum + left_sum + 1) / (shown_count + left_count + 2)
        m1 = (shown_sum + 8 * pooled) / (shown_count + 8)
        m0 = (left_sum + 8 * pooled) / (left_count + 8)
        weight = min(p_out, 1 - p_out)
        y = (reward - m1) / (1 - p_out) if shown else -(reward - m0) / p_out
        bets = side * _BETS * weight
        capitals = capitals * (1 + bets * y) * np.exp(bets * (m1 - m0 - uplift))
        shown_sum += reward * shown
        left_sum += reward * (not shown)
        shown_count += shown
        left_count += not shown
    return math.log(capitals.sum())


# What the specification asks for.

HARMFUL, HELPFUL, IDLE = 50, 50, 100


@pytest.mark.parametrize("seed", range(3))
def test_harmful_entries_are_found_and_others_are_not(seed: int) -> None:
    """Base rate 0.5, effect 0.3, 150 uses per arm; looked at after every use."""
    rng = np.random.default_rng(seed)
    rates = np.repeat([0.2, 0.8, 0.5], [HARMFUL, HELPFUL, IDLE])
    found_harmful, missed_zero = np.zeros(rates.size, bool), np.zeros(rates.size, bool)
    for index, rate in enumerate(rates):
        evidence = Evidence()
        for shown in rng.permutation(np.repeat([True, False], 150)):
            evidence.add(float(rng.random() < (rate if shown else 0.5)), shown=bool(shown), p_out=0.5)
            found_harmful[index] |= evidence.harmful
            missed_zero[index] |= evidence.harmful or evidence.helpful
    assert found_harmful[:HARMFUL].sum() >= 0.95 * HARMFUL
    assert found_harmful[HARMFUL:].sum() <= 0.02 * (HELPFUL + IDLE)
    assert missed_zero[-IDLE:].sum() <= 0.05 * IDLE
    assert missed_zero[HARMFUL:-IDLE].sum() >= 0.95 * HELPFUL  # helpful ones are found as well


def ever_missed(truths: Sequence[float], uses: Sequence[Use]) -> bool:
    """Whether the interval was without the truth after any of the uses; there is one truth for each."""
    evidence = Evidence()
    missed = False
    for truth, (reward, shown, p_out) in zip(truths, uses, strict=True):
        evidence.add(reward, shown=shown, p_out=p_out)
        missed |= max(evidence.log_capital(truth)) > LIMIT
    return missed


@pytest.mark.parametrize("effect", [-0.4, 0.0, 0.25])
def test_the_interval_covers_a_constant_uplift_at_all_times(effect: float) -> None:
    """The holdout probability changes from use to use, and rewards lie between 0 and 1."""
    rng = np.random.default_rng(5)
    missed = 0
    for _ in range(200):
        p_out = rng.choice([0.5, 0.25, 0.125, 0.05], 120)
        shown = rng.random(120) >= p_out
        rewards = rng.beta(2 * (0.5 + effect * shown), 2 * (0.5 - effect * shown))
        missed += ever_missed([effect] * 120, [*zip(rewards.tolist(), shown.tolist(), p_out.tolist(), strict=True)])
    assert missed <= ALPHA * 200


def test_the_interval_covers_the_weighted_mean_of_an_uplift_that_changes() -> None:
    """From +0.4 to -0.4, at a change of p_out as well."""
    rng = np.random.default_rng(6)
    uplifts = np.repeat([0.4, -0.4], [100, 200])
    p_out = np.repeat([0.5, 0.2], [100, 200])
    truths = np.cumsum(np.minimum(p_out, 1 - p_out) * uplifts) / np.cumsum(np.minimum(p_out, 1 - p_out))
    missed = 0
    for _ in range(100):
        shown = rng.random(300) >= p_out
        rewards = (rng.random(300) < 0.5 + uplifts * shown).astype(float)
        missed += ever_missed(truths.tolist(), [*zip(rewards.tolist(), shown.tolist(), p_out.tolist(), strict=True)])
    assert missed <= ALPHA * 100


def test_an_entry_that_turns_harmful_is_found_harmful() -> None:
    helped = [(float(shown), shown, 0.5) for shown in [True, False] * 20]
    harmed = [(float(not shown), shown, 0.5) for shown in [True, False] * 60]
    assert after(helped).helpful
    assert after(helped + harmed).harmful


# What the method promises of every use.


@settings(max_examples=examples(200))
@given(USES, st.floats(0, 1), st.floats(0, 1), SHARES)
def test_capital_is_not_expected_to_grow_at_the_true_uplift(
    uses: list[Use], q1: float, q0: float, p_out: float
) -> None:
    """Over the next use, which is shown or left out and earns 1 or 0, whatever came before."""
    before = after(uses).log_capital(q1 - q0)
    for side in (0, 1):
        expected = 0.0
        for shown, reward in product((True, False), (0.0, 1.0)):
            rate = q1 if shown else q0
            chance = (1 - p_out if shown else p_out) * (rate if reward else 1 - rate)
            growth = after([*uses, (reward, shown, p_out)]).log_capital(q1 - q0)[side] - before[side]
            assert math.isfinite(growth)
            expected += chance * math.exp(growth)
        assert expected <= 1 + 1e-9


@given(*[st.floats(0, 1)] * 4, SHARES)
def test_scores_are_unbiased_and_bounded(q1: float, q0: float, m1: float, m0: float, p_out: float) -> None:
    expected = 0.0
    for shown, reward in product((True, False), (0.0, 1.0)):
        rate = q1 if shown else q0
        use = score(reward, shown, p_out, m1, m0)
        assert abs(use.residual) <= 1 + 1e-12
        expected += (1 - p_out if shown else p_out) * (rate if reward else 1 - rate) * (use.predicted + use.residual)
    assert expected == pytest.approx(min(p_out, 1 - p_out) * (q1 - q0), abs=1e-12)


@settings(max_examples=examples(200))
@given(MODERATE, st.floats(-1, 1))
def test_the_capital_is_that_of_the_formula(uses: list[Use], uplift: float) -> None:
    expected = [plain_log_capital(uses, uplift, side) for side in (1, -1)]
    assert after(uses).log_capital(uplift) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=examples(200))
@given(USES)
def test_the_interval_has_what_neither_side_rejects(uses: list[Use]) -> None:
    evidence = after(uses)
    lower, upper = evidence.interval
    assert -1 <= lower <= upper <= 1
    for uplift in np.linspace(-1, 1, 41):
        above, below = evidence.log_capital(uplift)
        assert not (above > LIMIT + 1e-6 and uplift > lower)
        assert not (below > LIMIT + 1e-6 and uplift < upper)
        assert lower - 1e-12 <= uplift <= upper + 1e-12 or max(above, below) > LIMIT - 1e-6
    if evidence.uplift is not None:
        assert lower <= evidence.uplift <= upper


@settings(max_examples=examples(200))
@given(st.lists(st.booleans(), min_size=1, max_size=80), st.sampled_from([0.5, 0.25]), st.booleans())
def test_harmful_and_helpful_are_what_the_interval_says(shown: list[bool], p_out: float, helps: bool) -> None:
    evidence = after([(float(one == helps), one, p_out) for one in shown])
    lower, upper = evidence.interval
    assert (evidence.harmful, evidence.helpful) == (upper < 0, lower > 0)
    assert not (evidence.harmful if helps else evidence.helpful)


def test_counts_and_means() -> None:
    evidence = Evidence()
    assert (evidence.mean_shown, evidence.mean_left_out, evidence.uplift) == (None, None, None)
    assert evidence.interval == (-1, 1)
    evidence.add(0.75, shown=True, p_out=0.5)
    evidence.add(0.25, shown=True, p_out=0.5)
    assert (evidence.uses_shown, evidence.mean_shown, evidence.uplift) == (2, 0.5, None)
    evidence.add(0.25, shown=False, p_out=0.5)
    assert (evidence.uses_left_out, evidence.mean_left_out) == (1, 0.25)
    assert evidence.uplift is not None and 0 < evidence.uplift < 1


@pytest.mark.parametrize("p_out", [0.5, 0.1])
def test_the_estimate_approaches_the_uplift(p_out: float) -> None:
    rng = np.random.default_rng(7)
    shown = rng.random(5000) >= p_out
    rewards = rng.random(5000) < 0.3 + 0.2 * shown
    evidence = after([(float(reward), bool(one), p_out) for reward, one in zip(rewards, shown, strict=True)])
    assert evidence.uplift == pytest.approx(0.2, abs=0.06)
    lower, upper = evidence.interval
    assert 0 < lower < 0.2 < upper < 0.4


@pytest.mark.parametrize("reward", [0.0, 0.5, 1.0])
def test_equal_rewards_say_nothing_against_an_entry(reward: float) -> None:
    rng = np.random.default_rng(8)
    evidence = after([(reward, bool(shown), 0.25) for shown in rng.random(2000) >= 0.25])
    lower, upper = evidence.interval
    assert -0.1 < lower < 0 < upper < 0.1


@pytest.mark.parametrize("p_out", [5e-324, 1e-12, 1 - 2**-53])
def test_an_entry_that_is_nearly_never_drawn_keeps_its_interval(p_out: float) -> None:
    evidence = after([(reward, shown, p_out) for reward in (0.0, 1.0) for shown in (True, False, True)])
    assert evidence.interval == (-1, 1)
    assert evidence.uplift is not None and -1 <= evidence.uplift <= 1


def test_which_contrast_an_uplift_is() -> None:
    """An entry without effect beside a helpful one: the marginal contrast is negative. That of uses in which the other
    is shown is 0."""
    rng = np.random.default_rng(9)
    holdout, helpful = 0.5, 1
    marginal, own = Evidence(), Evidence()
    for attempt in range(8000):
        left_out = draw(0, str(attempt), ("idle", "helpful"), holdout)
        reward = float(rng.random() < (0.4 if left_out == helpful else 0.7))
        marginal.add(reward, shown=left_out != 0, p_out=holdout / 2)
        if left_out != helpful:
            own.add(reward, shown=left_out is None, p_out=(holdout / 2) / (1 - holdout + holdout / 2))
    q = holdout * 1 / (2 - holdout)
    assert marginal.uplift == pytest.approx(-q * 0.3, abs=0.03)
    assert marginal.harmful
    assert own.uplift == pytest.approx(0, abs=0.03)
    assert not own.harmful and not own.helpful


# The bytes.


@settings(max_examples=examples(100))
@given(USES, USES)
def test_bytes_hold_the_whole_state(uses: list[Use], more: list[Use]) -> None:
    evidence = after(uses)
    data = evidence.to_bytes()
    assert len(data) == 189
    restored = Evidence.from_bytes(data)
    assert restored.to_bytes() == data
    for reward, shown, p_out in more:
        restored.add(reward, shown=shown, p_out=p_out)
    assert restored.to_bytes() == after(uses + more).to_bytes()
    assert restored.interval == after(uses + more).interval


SOME = after([(1.0, True, 0.5), (0.0, False, 0.25)] * 3).to_bytes()


@settings(max_examples=examples(200))
@given(st.integers(0, len(SOME) - 1), st.integers(1, 255))
def test_damaged_bytes_are_refused(place: int, change: int) -> None:
    damaged = bytearray(SOME)
    damaged[place] ^= change
    with pytest.raises(ValueError, match=r"evidence (of version|is damaged)"):
        Evidence.from_bytes(bytes(damaged))


@pytest.mark.parametrize("data", [b"", SOME[:-1], SOME + b"\0", SOME[:4]])
def test_bytes_of_another_length_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=f"evidence of {len(data)} bytes, expected 189"):
        Evidence.from_bytes(data)


@pytest.mark.parametrize("reward", [-0.1, 1.1, math.nan, math.inf])
def test_a_reward_outside_of_its_range_is_refused(reward: float) -> None:
    evidence = Evidence()
    with pytest.raises(ValueError, match=f"reward {reward}, not a number from 0 to 1"):
        evidence.add(reward, shown=True, p_out=0.5)
    assert evidence.to_bytes() == Evidence().to_bytes()


@pytest.mark.parametrize("p_out", [0.0, 1.0, -0.5, math.nan])
def test_a_probability_outside_of_its_range_is_refused(p_out: float) -> None:
    with pytest.raises(ValueError, match=f"p_out {p_out}, not a number between 0 and 1"):
        Evidence().add(0.5, shown=True, p_out=p_out)
