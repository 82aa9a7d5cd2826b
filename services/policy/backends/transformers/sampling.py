"""Drawing the next tokens of a whole batch at once. Shapes: R requests, V vocabulary.

The random numbers of a request depend on its seed and on how many tokens it has sampled, on nothing else: whatever
else is in the batch, a repeated request draws the same numbers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

_MASK = 2**64 - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))


def stream(seed: int) -> int:
    """The start of a request's sequence of random numbers; neighbouring seeds lie far apart."""
    state = seed & _MASK
    for _ in range(2):
        state = state + int(_GOLDEN) & _MASK
        for shift, factor in _MIX:
            state = (state ^ state >> int(shift)) * int(factor) & _MASK
        state ^= state >> 31
    return state


def uniforms(streams_R: npt.NDArray[np.uint64], counts_R: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Numbers in (0, 1), the `counts_R`-th of each stream: SplitMix64 at a given position, upper 32 bits.

    Coarser than float64 on purpose: u * total stays below total after rounding. https://doi.org/10.1145/2714064.2660195
    """
    bits = _mix(streams_R + (counts_R.astype(np.uint64) + np.uint64(1)) * _GOLDEN) >> np.uint64(32)
    return (bits.astype(np.float64) + 0.5) * 2.0**-32


def _mix(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    for shift, factor in _MIX:
        state = (state ^ (state >> shift)) * factor
    return state ^ (state >> np.uint64(31))


def sample(
    logits_RV: torch.Tensor,
    temperature_R: npt.NDArray[np.float32],
    top_p_R: npt.NDArray[np.float32],
    top_k_R: npt.NDArray[np.int64],
    uniform_R: npt.NDArray[np.float64],
    allowed_RV: npt.NDArray[np.bool_] | None = None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Tokens [R] and their log-probabilities [R] of softmax(logits / temperature), before top-p and top-k.

    Temperature 0 takes the likeliest token, with its log-probability of softmax(logits). With `allowed_RV` only those
    tokens are drawn, at least one of each row, in proportion to their probabilities; the log-probabilities remain.
    """
    device = logits_RV.device
    greedy_R = temperature_R == 0
    scaled_RV = logits_RV.float() / torch.from_numpy(np.where(greedy_R, 1, temperature_R)).to(device)[:, None]
    log_probs_RV = torch.log_softmax(scaled_RV, dim=-1)
    drawn_RV = log_probs_RV
    if allowed_RV is not None:  # normalised anew, since what is allowed may be too unlikely for float32
        drawn_RV = torch.log_softmax(
            scaled_RV.masked_fill(~torch.from_numpy(allowed_RV).to(device), -torch.inf), dim=-1
        )
    restricted_R = ~greedy_R & ((top_p_R < 1) | (top_k_R > 0))
    target_R = torch.from_numpy(uniform_R).to(device)
    tokens_R = drawn_RV.argmax(-1) if greedy_R.all() else _inverse_cdf(drawn_RV.exp(), target_R)
    if greedy_R.any() and not greedy_R.all():
        rows = torch.from_numpy(np.flatnonzero(greedy_R)).to(device)
        tokens_R[rows] = drawn_RV[rows].argmax(-1)
    if restricted_R.any():
        chosen = np.flatnonzero(restricted_R)
        rows = torch.from_numpy(chosen).to(device)
        top_p = torch.from_numpy(top_p_R[chosen]).to(device)
        top_k = torch.from_numpy(top_k_R[chosen]).to(device)
        tokens_R[rows] = _restricted(drawn_RV[rows].exp(), top_p, top_k, target_R[rows])
    picked_R = log_probs_RV.gather(1, tokens_R[:, None])[:, 0]
    return tokens_R.cpu().numpy(), picked_R.cpu().numpy()


def _inverse_cdf(weights_RV: torch.Tensor, uniform_R: torch.Tensor) -> torch.Tensor:
    """The first token whose cumulative weight exceeds uniform * total: never one of weight 0."""
    cumulative_RV = weights_RV.cumsum(-1, dtype=torch.float64)
    target_R1 = (uniform_R * cumulative_RV[:, -1])[:, None]
    return torch.searchsorted(cumulative_RV, target_R1, right=True)[:, 0]


def _restricted(
    probs_RV: torch.Tensor, top_p_R: torch.Tensor, top_k_R: torch.Tensor, uniform_R: torch.Tensor
) -> torch.Tensor:
    """Draws among the k likeliest tokens, cut to the fewest that together reach top_p of what those k weigh.

    The likeliest token always remains. Equally likely tokens keep the order of the vocabulary.
    """
    sorted_RV, order_RV = probs_RV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(probs_RV.shape[-1], device=probs_RV.device)
    limit_R = torch.where(top_k_R > 0, top_k_R, probs_RV.shape[-1])
    sorted_RV = sorted_RV * (rank_V < limit_R[:, None])
    before_RV = sorted_RV.cumsum(-1, dtype=torch.float64) - sorted_RV
    total_R1 = sorted_RV.sum(-1, keepdim=True, dtype=torch.float64)
    kept_RV = (before_RV < top_p_R[:, None].double() * total_R1) | (rank_V == 0)
    picked_R = _inverse_cdf(sorted_RV * kept_RV, uniform_R)
    return order_RV.gather(1, picked_R[:, None])[:, 0]
