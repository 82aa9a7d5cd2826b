"""Losses, KL, mismatch corrections, aggregations, advantages, preference and divergence: against TRL itself, on random
data of different lengths.

All comparisons with TRL are in this file, as its import takes seconds in each process of the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from transformers import AutoModelForCausalLM

from mulligan.trainer.advantages import ADVANTAGES, Return
from mulligan.trainer.advantages._statistics import deviation
from mulligan.trainer.aggregation import Aggregation, aggregate
from mulligan.trainer.data import Datum, Distillation
from mulligan.trainer.loss_terms import MismatchCorrection, mismatch_weights
from mulligan.trainer.losses import ppo, read_loss
from mulligan.trainer.objective import Loss, Terms
from mulligan.trainer.objectives import distillation, divergence, policy_gradient, preference, transfer
from mulligan.trainer.settings import LossSettings
from tests.support import trl_reference as trl
from tests.support.learning import PLAIN, make, sampled
from tests.support.returns import flat, groups
from tests.support.terms import floats, gradient, ragged, scored, terms
from tests.support.tiny_model import VOCABULARY_SIZE, write_tiny_model

SEEDS = pytest.mark.parametrize("seed", range(3))

FEW = settings(max_examples=40)  # each takes some tens of milliseconds

LONGEST = 40
AGGREGATIONS: dict[Aggregation, dict[str, Any]] = {
    Aggregation.SEQUENCE_MEAN_TOKEN_MEAN: {"loss_type": "grpo"},
    Aggregation.TOKEN_MEAN: {"loss_type": "dapo"},  # "bnpo" is the same over one batch
    Aggregation.CONSTANT: {"loss_type": "dr_grpo", "max_completion_length": LONGEST},
    Aggregation.SEQUENCE_MEAN_TOKEN_SUM: {"loss_type": "luspo"},
}


def loss_settings(**changes: Any) -> LossSettings:
    """As GRPOConfig is without more: no divergence, and PPO with the same bound on both sides and no dual clip."""
    common = {"kl_coefficient": 0.0, "mismatch_correction": MismatchCorrection.NONE}
    own = {} if "name" in changes else {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 0.0}
    return read_loss(common | own | changes)


@dataclass(frozen=True)
class Batch:
    """Random data for a policy gradient: numbers of trained tokens, and a value per token of everything else."""

    counts: list[int]
    new_N: Tensor
    old_N: Tensor
    rollout_N: Tensor
    reference_N: Tensor
    entropy_N: Tensor
    advantages_N: Tensor

    @property
    def lengths(self) -> Tensor:
        return torch.tensor(self.counts)

    def terms(self, **numbers: Tensor) -> Terms:
        values = {
            "rollout_log_probs": self.rollout_N,
            "old_log_probs": self.old_N,
            "advantages": self.advantages_N,
        }
        zeros = torch.zeros(len(self.counts), dtype=torch.float64)
        made = terms(
            self.counts,
            self.new_N,
            numbers={"advantage": zeros, **numbers},
            token_values=values,
            reference_N=self.reference_N,
        )
        return replace(made, entropy_N=self.entropy_N)

    def grpo(self, *, by_vllm: bool = False, **config: Any) -> trl.Found:
        return trl.grpo(
            self.counts,
            self.new_N,
            self.old_N,
            self.advantages_N,
            rollout_log_probs_N=self.rollout_N if by_vllm else None,
            reference_log_probs_N=self.reference_N,
            entropy_N=self.entropy_N,
            **config,
        )


def make_batch(seed: int, *, spread: float = 1.5, per_token: bool = False) -> Batch:
    """`spread` is the largest difference of log-probabilities between policies. Advantages differ within a datum only
    with `per_token`."""
    counts = ragged(seed, trl.GROUP)
    count = sum(counts)
    new_N = floats(count, -4, 0, seed).requires_grad_()
    near = [new_N.detach() + floats(count, -spread, spread, seed + place) for place in (1, 2, 3)]
    per_datum_N = floats(len(counts), -2, 2, seed + 4).repeat_interleave(torch.tensor(counts))
    advantages_N = floats(count, -2, 2, seed + 4) if per_token else per_datum_N
    entropy_N = floats(count, 0, 3, seed + 5).requires_grad_()
    # In TRL, log-probabilities of sampling are float32.
    return Batch(counts, new_N, near[0], near[1].float().double(), near[2], entropy_N, advantages_N)


def total(batch: Batch, found: Loss, mode: Aggregation) -> Tensor:
    """The loss that the learner differentiates, for a branch of weight 3, divided by this weight."""
    share = 3 / len(batch.counts)
    data = [
        Datum(str(place), (1,) * (count + 1), (False, *[True] * count), share, 1.0, Distillation(1.0), "first")
        for place, count in enumerate(batch.counts)
    ]
    weights = torch.tensor([datum.weight for datum in aggregate(data, mode, LONGEST)], dtype=torch.float64)
    return (weights.repeat_interleave(batch.lengths) * found.loss_N).sum() / 3


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)


def assert_same(found: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    """Both the values and the derivatives by each of the inputs."""
    assert_equal(found, expected)
    for one, other in zip(gradient(found, *inputs), gradient(expected, *inputs), strict=True):
        assert_equal(one, other)


@SEEDS
@pytest.mark.parametrize("mode", list(Aggregation))
@pytest.mark.parametrize(
    ("changes", "config"),
    [
        ({}, {}),
        ({"clip_high": 0.28}, {"epsilon_high": 0.28}),
        # TRL's delta bounds the ratio for both signs of the advantage, our dual clip for negative advantages alone
        # (arXiv 1912.09729). They differ only below 1 + clip_high, which TRL's documentation rules out for delta.
        ({"dual_clip": 3.0}, {"delta": 3.0}),
        # TRL multiplies the divergence by the ratio unless told otherwise (arXiv 2512.02556); ours is that of GRPO.
        ({"kl_coefficient": 0.1}, {"beta": 0.1, "use_bias_correction_kl": False}),
    ],
    ids=["clip", "clip-higher", "dual-clip", "kl"],
)
def test_ppo(seed: int, mode: Aggregation, changes: dict[str, float], config: dict[str, Any]) -> None:
    batch = make_batch(seed, per_token=True)
    found = policy_gradient.loss(batch.terms(), loss_settings(**changes))
    expected = batch.grpo(**config, **AGGREGATIONS[mode])
    assert_same(total(batch, found, mode), expected.loss, batch.new_N)
    if "beta" in config:
        assert found.metrics["kl"].mean().item() == pytest.approx(expected.metrics["kl"], abs=1e-6)
    if "delta" not in config:  # TRL counts no tokens that its delta bounds
        clipped = found.metrics["clip_fraction"].double().mean().item()
        assert 0 < clipped < 1 and clipped == pytest.approx(expected.metrics["clip_ratio/region_mean"], abs=1e-6)


@SEEDS
def test_without_old_log_probs_the_present_policy_is_the_old_one(seed: int) -> None:
    batch = make_batch(seed)
    made = batch.terms()
    absent_N = torch.full_like(batch.old_N, torch.nan)
    found = policy_gradient.loss(
        replace(made, token_values={**made.token_values, "old_log_probs": absent_N}), loss_settings()
    )
    expected = trl.grpo(batch.counts, batch.new_N, None, batch.advantages_N, loss_type="dapo")
    assert_same(total(batch, found, Aggregation.TOKEN_MEAN), expected.loss, batch.new_N)


@SEEDS
@pytest.mark.parametrize("mode", list(Aggregation))
def test_gspo(seed: int, mode: Aggregation) -> None:
    batch = make_batch(seed, spread=0.5)
    found = policy_gradient.loss(batch.terms(), loss_settings(name="gspo", clip_low=0.02, clip_high=0.03))
    config: dict[str, Any] = {"importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03}
    expected = batch.grpo(**config, **AGGREGATIONS[mode])
    assert_same(total(batch, found, mode), expected.loss, batch.new_N)
    clipped = found.metrics["clip_fraction"].double().mean().item()
    assert 0 < clipped < 1 and clipped == pytest.approx(expected.metrics["clip_ratio/region_mean"], abs=1e-6)


@SEEDS
def test_cispo(seed: int) -> None:
    """TRL's epsilon_high is the largest ratio itself, and there is no smallest one."""
    batch = make_batch(seed, spread=3, per_token=True)
    found = policy_gradient.loss(batch.terms(), loss_settings(name="cispo", clip_low=1.0, clip_high=4.0))
    expected = batch.grpo(loss_type="cispo", epsilon_high=5.0)
    assert_same(total(batch, found, Aggregation.TOKEN_MEAN), expected.loss, batch.new_N)
    # TRL counts clipped tokens only where the advantage is positive; they are clipped where it is negative, too.
    clipped = (found.metrics["clip_fraction"] & (batch.advantages_N > 0)).double().mean().item()
    assert 0 < clipped < 1 and clipped == pytest.approx(expected.metrics["cispo_clip_ratio"], abs=1e-6)


@SEEDS
def test_entropy(seed: int) -> None:
    """TRL's bonus is a mean over tokens whatever the loss type. Ours is summed as the rest of the loss is."""
    batch = make_batch(seed)
    found = policy_gradient.loss(batch.terms(), loss_settings(entropy_coefficient=0.1))
    expected = batch.grpo(loss_type="bnpo", entropy_coef=0.1)
    assert_same(total(batch, found, Aggregation.TOKEN_MEAN), expected.loss, batch.new_N, batch.entropy_N)
    assert batch.entropy_N.mean().item() == pytest.approx(expected.metrics["entropy"], abs=1e-6)


LIMIT = 1.5
CORRECTIONS: list[tuple[MismatchCorrection, dict[str, Any]]] = [
    (MismatchCorrection.NONE, {"vllm_importance_sampling_correction": False}),
    (
        MismatchCorrection.TRUNCATED,
        {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": LIMIT},
    ),
    (
        MismatchCorrection.MASKED,
        {
            "vllm_importance_sampling_mode": "token_mask",
            "vllm_importance_sampling_clip_max": LIMIT,
            "vllm_importance_sampling_clip_min": 1 / LIMIT,
        },
    ),
]


@SEEDS
@pytest.mark.parametrize(("correction", "config"), CORRECTIONS)
@pytest.mark.parametrize("mode", [Aggregation.TOKEN_MEAN, Aggregation.SEQUENCE_MEAN_TOKEN_MEAN])
def test_mismatch_corrections(
    seed: int, mode: Aggregation, correction: MismatchCorrection, config: dict[str, Any]
) -> None:
    """They weigh the policy's loss and not the divergence."""
    batch = make_batch(seed)
    ours = loss_settings(kl_coefficient=0.1, mismatch_correction=correction, mismatch_limit=LIMIT)
    found = policy_gradient.loss(batch.terms(), ours)
    divergence_config = {"beta": 0.1, "use_bias_correction_kl": False}
    expected = batch.grpo(by_vllm=True, **divergence_config, **config, **AGGREGATIONS[mode])
    assert_same(total(batch, found, mode), expected.loss, batch.new_N)


@SEEDS
def test_corrections_of_whole_sequences(seed: int) -> None:
    """TRL decides by the product of a sequence's ratios, which is also the weight. Ours decides by their geometric
    mean, and what is kept weighs 1. So TRL is given ratios whose product is that mean. Ours has no "sequence_truncate".
    """
    batch = make_batch(seed)
    divided_N = (batch.old_N - batch.rollout_N) / batch.lengths.repeat_interleave(batch.lengths)
    expected = trl.importance_weights(
        batch.counts,
        batch.rollout_N + divided_N,
        batch.rollout_N,
        vllm_importance_sampling_mode="sequence_mask",
        vllm_importance_sampling_clip_max=LIMIT,
        vllm_importance_sampling_clip_min=1 / LIMIT,
    )
    made = batch.terms()
    found = mismatch_weights(
        batch.old_N,
        batch.rollout_N,
        MismatchCorrection.SEQUENCE_MASKED,
        LIMIT,
        lambda values_N: made.per_token(made.means(values_N)),
    )
    assert found.tolist() == (expected > 0).tolist() and set(found.tolist()) == {0.0, 1.0}


@SEEDS
def test_a_correction_of_tokens_with_one_ratio_per_sequence(seed: int) -> None:
    """GSPO's values are TRL's. Its gradients are so for a sequence as a whole: here a token's has its own weight, in
    TRL the mean weight of the sequence."""
    batch = make_batch(seed, spread=0.5)
    correction, config = CORRECTIONS[1]
    ours = loss_settings(name="gspo", mismatch_correction=correction, mismatch_limit=LIMIT)
    found = total(batch, policy_gradient.loss(batch.terms(), ours), Aggregation.TOKEN_MEAN)
    gspo = {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4, "loss_type": "dapo"}
    expected = batch.grpo(by_vllm=True, **gspo, **config).loss
    assert_equal(found, expected)

    def sums(values_N: Tensor) -> Tensor:
        return torch.stack([part.sum() for part in values_N.split(batch.counts)])

    assert_equal(sums(gradient(found, batch.new_N)[0]), sums(gradient(expected, batch.new_N)[0]))


@SEEDS
def test_transfer_with_a_ratio_is_the_policy_gradient_without_correction(seed: int) -> None:
    batch = make_batch(seed)
    shape = torch.zeros(len(batch.counts), dtype=torch.float64)
    found = transfer.loss(batch.terms(shape=shape, ratio=shape + 1), loss_settings(kl_coefficient=0.1))
    expected = batch.grpo(beta=0.1, use_bias_correction_kl=False, loss_type="grpo")
    assert_same(total(batch, found, Aggregation.SEQUENCE_MEAN_TOKEN_MEAN), expected.loss, batch.new_N)


@SEEDS
@pytest.mark.parametrize("given", [False, True])
def test_preference(seed: int, given: bool) -> None:
    """The supervised term is TRL's loss type "sft". TRL takes its mean over the tokens of all pairs, ours over those of
    each pair, so each pair is given to TRL alone. `given`: the reference's log-probabilities come with the datum."""
    chosen, rejected = make_batch(seed), make_batch(seed + 50)
    ftx = 0.5
    beta = torch.tensor([0.1, 0.5], dtype=torch.float64).repeat(trl.GROUP // 2)
    absent_N, absent_M = (torch.full_like(batch.new_N, torch.nan).detach() for batch in (chosen, rejected))
    other = scored(rejected.counts, rejected.new_N, absent_M if given else rejected.reference_N)
    made = terms(
        chosen.counts,
        chosen.new_N,
        numbers={"beta": beta, "ftx": torch.full_like(beta, ftx)},
        token_values={"reference_log_probs": chosen.reference_N if given else None},
        others={"rejected": replace(other, given_N=rejected.reference_N if given else None)},
        reference_N=absent_N if given else chosen.reference_N,
    )
    found = preference.loss(made, ppo.Settings())
    sequences = zip(
        *(values_N.split(chosen.counts) for values_N in (chosen.new_N, chosen.reference_N)),
        *(values_M.split(rejected.counts) for values_M in (rejected.new_N, rejected.reference_N)),
        beta.tolist(),
        strict=True,
    )
    expected = [
        trl.preference(
            own, worse, reference, worse_reference, beta=one, loss_type=("sigmoid", "sft"), loss_weights=(1.0, ftx)
        )
        for own, reference, worse, worse_reference, one in sequences
    ]
    losses = torch.stack([part.sum() for part in found.loss_N.split(chosen.counts)])
    assert_same(losses, torch.stack([one.loss for one in expected]), chosen.new_N, rejected.new_N)
    for ours, theirs in (("margin", "rewards/margins"), ("accuracy", "rewards/accuracies")):
        values = [part[0].item() for part in found.metrics[ours].split(chosen.counts)]
        assert values == pytest.approx([one.metrics[theirs] for one in expected], abs=1e-6)


@SEEDS
def test_distillation(seed: int) -> None:
    """With weight 1 it is TRL's loss type "sft", a mean over the tokens of the batch."""
    batch = make_batch(seed)
    found = distillation.loss(batch.terms(target_weight=torch.ones(trl.GROUP)), ppo.Settings())
    expected = trl.preference(
        batch.new_N, batch.new_N, batch.new_N.detach(), batch.new_N.detach(), loss_type=("sft",), loss_weights=(1.0,)
    )
    assert_same(total(batch, found, Aggregation.TOKEN_MEAN), expected.loss, batch.new_N)


@SEEDS
def test_divergence(seed: int) -> None:
    betas = [0.0, 1.0, 0.5, 0.9, 0.0, 0.1, 1.0]
    logits = floats(7 * 11, -3, 3, seed).view(7, 11).requires_grad_()
    teacher = floats(7 * 11, -3, 3, seed + 1).view(7, 11)
    found = divergence.divergence(logits.log_softmax(-1), teacher.log_softmax(-1), torch.tensor(betas).double())
    rows = zip(logits, teacher, betas, strict=True)
    assert_same(found, torch.stack([trl.divergence(*row) for row in rows]), logits)


def estimated(name: str, batch: Sequence[Sequence[Return]], **settings: Any) -> list[float]:
    estimator = ADVANTAGES.find(name)
    return flat(estimator.estimate(batch, estimator.Settings(**settings)))


def rewards_of(batch: Sequence[Sequence[Return]]) -> list[list[float]]:
    return [[sample.reward for sample in group] for group in batch]


@FEW
@given(groups())
def test_advantages_without_a_deviation(batch: list[list[Return]]) -> None:
    expected = pytest.approx(trl.advantages("GRPO", rewards_of(batch), scale_rewards="none"), abs=1e-6)
    assert estimated("dr_grpo", batch) == expected
    assert estimated("grpo", batch, normalize_by_std=False) == expected


@FEW
@given(groups())
def test_advantages_in_deviations_of_the_group(batch: list[list[Return]]) -> None:
    """TRL adds 1e-4 to the deviation, ours 1e-6."""
    rewards = rewards_of(batch)
    theirs = trl.advantages("GRPO", rewards, scale_rewards="group")
    deviations = [deviation(group) for group in rewards for _ in group]
    expected = [value * (one + 1e-4) for value, one in zip(theirs, deviations, strict=True)]
    found = [value * (one + 1e-6) for value, one in zip(estimated("grpo", batch), deviations, strict=True)]
    assert found == pytest.approx(expected, abs=1e-6)


@FEW
@given(groups())
def test_advantages_in_deviations_of_the_batch(batch: list[list[Return]]) -> None:
    """TRL adds 1e-4 to the deviation, ours 1e-6."""
    rewards = rewards_of(batch)
    one = deviation([reward for group in rewards for reward in group])
    expected = [value * (one + 1e-4) for value in trl.advantages("GRPO", rewards, scale_rewards="batch")]
    assert [value * (one + 1e-6) for value in estimated("lite_ppo", batch)] == pytest.approx(expected, abs=1e-6)


@FEW
@given(groups())
def test_advantages_against_the_others(batch: list[list[Return]]) -> None:
    expected = trl.advantages("RLOO", rewards_of(batch), beta=0.0)
    assert estimated("rloo", batch) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_entropies_of_a_model(tmp_path: Path, temperature: float) -> None:
    """In float32, in which the model computes."""
    tiny = write_tiny_model(tmp_path / "tiny")
    ids = [int(place) % VOCABULARY_SIZE for place in floats(30, 0, 1000, 0)]
    datum = sampled("all", ids, range(1, len(ids)), temperature=temperature, rollout=[-1.0] * (len(ids) - 1))
    learner = make(tiny, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    log_probs, entropies = trl.log_probs_and_entropies(model, ids, temperature)
    assert learner.forward([datum])[0] == pytest.approx(log_probs.tolist(), rel=1e-6, abs=1e-6)
    entropy = learner.forward_backward([datum], PLAIN)["entropy"]
    assert entropy == pytest.approx(entropies.mean().item(), abs=1e-6)
