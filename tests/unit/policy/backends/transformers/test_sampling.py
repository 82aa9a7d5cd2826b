"""Drawing tokens: the distribution, its restrictions, and what the numbers depend on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from mulligan.policy.backends.transformers.sampling import sample, stream, uniforms

DRAWS = 20_000


def draw(
    logits: Sequence[float],
    count: int = 1,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    allowed: Sequence[int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    rows = torch.tensor(logits).expand(count, -1)
    uniform = uniforms(np.full(count, stream(seed), dtype=np.uint64), np.arange(count))
    return sample(
        rows,
        np.full(count, temperature, dtype=np.float32),
        np.full(count, top_p, dtype=np.float32),
        np.full(count, top_k, dtype=np.int64),
        uniform,
        None if allowed is None else np.tile(np.isin(np.arange(len(logits)), allowed), (count, 1)),
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_follow_the_softmax_at_the_temperature(temperature: float) -> None:
    logits = [1.0, -2.0, 0.3, 2.5, 0.0]
    tokens, log_probs = draw(logits, DRAWS, temperature=temperature)
    expected = torch.log_softmax(torch.tensor(logits) / temperature, -1)
    frequency = np.bincount(tokens, minlength=len(logits)) / DRAWS
    assert frequency == pytest.approx(expected.exp().numpy(), abs=0.012)
    assert log_probs == pytest.approx(expected[torch.from_numpy(tokens)].numpy(), abs=1e-6)


def test_greedy_takes_the_likeliest_with_its_log_probability_at_temperature_1() -> None:
    logits = [0.0, 3.0, 3.0, -1.0]
    tokens, log_probs = draw(logits, 5, temperature=0.0, top_p=0.1, top_k=1)
    assert tokens.tolist() == [1] * 5
    assert log_probs == pytest.approx(float(torch.log_softmax(torch.tensor(logits), -1)[1]))


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_what_is_allowed_is_drawn_in_proportion_and_keeps_the_log_probs_of_all(temperature: float) -> None:
    logits = [1.0, -200.0, 0.3, 90.0, -201.0]
    scaled = torch.tensor(logits) / temperature
    for allowed in ([0, 2], [1, 4], [0, 1, 2, 3, 4]):  # the second so unlikely that float32 calls it impossible
        tokens, log_probs = draw(logits, DRAWS, temperature=temperature, allowed=allowed)
        frequency = np.bincount(tokens, minlength=len(logits)) / DRAWS
        expected = np.zeros(len(logits))
        expected[allowed] = torch.softmax(scaled[allowed], -1).numpy()
        assert frequency == pytest.approx(expected, abs=0.012)
        assert log_probs == pytest.approx(torch.log_softmax(scaled, -1)[torch.from_numpy(tokens)].numpy(), abs=1e-4)
    assert draw(logits, temperature=0.0, allowed=[1, 4])[0].tolist() == [1]
    assert set(draw(logits, 200, temperature=temperature, allowed=[1, 4], top_k=1)[0].tolist()) == {1}
    assert set(draw(logits, 200, temperature=temperature, allowed=[0, 2], top_p=0.1)[0].tolist()) == {0}


@pytest.mark.parametrize(
    ("top_p", "top_k", "allowed"),
    [
        (1.0, 0, {0, 1, 2, 3}),
        (1.0, 2, {3, 1}),
        (1.0, 9, {0, 1, 2, 3}),
        (0.45, 0, {3, 1}),  # 0.4 alone is less than 0.45
        (0.05, 0, {3}),
        (0.75, 0, {3, 1, 2}),
        (0.5, 2, {3}),  # 0.4 of the 0.7 that two tokens weigh is more than half of it
    ],
)
def test_restrictions_leave_the_likeliest_tokens_and_their_proportions(
    top_p: float, top_k: int, allowed: set[int]
) -> None:
    probs = np.array([0.1, 0.3, 0.2, 0.4])
    tokens, log_probs = draw(np.log(probs).tolist(), DRAWS, top_p=top_p, top_k=top_k)
    assert set(tokens.tolist()) == allowed
    weights = np.array([p if index in allowed else 0 for index, p in enumerate(probs)])
    assert np.bincount(tokens, minlength=4) / DRAWS == pytest.approx(weights / weights.sum(), abs=0.015)
    assert np.exp(log_probs) == pytest.approx(probs[tokens], rel=1e-5)  # of the whole distribution


def test_rows_of_all_kinds_in_one_batch_get_what_they_get_alone() -> None:
    rng = np.random.default_rng(1)
    logits = torch.from_numpy(rng.normal(size=(40, 17)).astype(np.float32))
    temperature = rng.choice([0.0, 0.3, 1.0, 2.0], 40).astype(np.float32)
    top_p = rng.choice([1.0, 0.9, 0.2], 40).astype(np.float32)
    top_k = rng.choice([0, 1, 5], 40)
    uniform = rng.uniform(size=40)
    together, _ = sample(logits, temperature, top_p, top_k, uniform)
    for row in range(40):
        one = slice(row, row + 1)
        assert sample(logits[one], temperature[one], top_p[one], top_k[one], uniform[one])[0][0] == together[row]


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]] * 3)
    ones = np.ones(3, dtype=np.float32)
    zeros = np.zeros(3, dtype=np.int64)
    tokens, _ = sample(logits, ones, ones, zeros, np.array([0.5 * 2**-32, 0.5, 1 - 2**-33]))
    assert tokens.tolist() == [1, 3, 3]


def test_random_numbers_depend_on_seed_and_count_alone_and_look_uniform() -> None:
    seeds = np.array([stream(seed) for seed in range(1000)], dtype=np.uint64)
    first, second = (uniforms(seeds, np.full(1000, count)) for count in (0, 1))
    assert uniforms(seeds[7:8], np.array([1]))[0] == second[7]
    for numbers in (first, second, uniforms(np.full(1000, seeds[0]), np.arange(1000))):
        assert len(set(numbers.tolist())) == 1000
        assert np.histogram(numbers, bins=10, range=(0, 1))[0] == pytest.approx(100, abs=40)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1
    assert stream(-1) != stream(1) and stream(2**63 - 1) != stream(0)
    assert first.min() > 0 and first.max() < 1


def test_the_lowest_temperature_stays_finite() -> None:
    tokens, log_probs = draw([500.0, -500.0, 499.0], 3, temperature=1e-3)
    assert tokens.tolist() == [0] * 3 and np.isfinite(log_probs).all()
