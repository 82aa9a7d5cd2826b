"""liger-kernel's fused head gives what the head in pieces gives: log-probabilities, entropies, and their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mulligan.trainer.learner import fused_head

TOKENS, HIDDEN, VOCABULARY = 1300, 64, 500  # more tokens than the kernel takes at once


def inputs(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=made)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=made) / 4
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=made)
    temperatures = torch.tensor([0.5, 1.0, 0.7])[torch.randint(3, (TOKENS,), generator=made)]
    upstream = torch.randn(2, TOKENS, generator=made)
    numbers: list[Any] = [each.to(device, dtype).requires_grad_() for each in (hidden, weight)]
    return (*numbers, targets.to(device), temperatures.to(device), upstream.to(device))


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, temperatures: Tensor) -> tuple[Tensor, Tensor]:
    log_probs = ((hidden @ weight.T).float() / temperatures[:, None]).log_softmax(-1)
    return log_probs.gather(-1, targets[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)


def compare(device: str, dtype: torch.dtype, tolerance: float) -> None:
    found: list[Tensor] = []
    gradients: list[tuple[Tensor, ...]] = []
    for function in (fused_head.score, plain):
        hidden, weight, targets, temperatures, upstream = inputs(device, dtype)
        values = torch.stack(function(hidden, weight, targets, temperatures))
        found.append(values)
        gradients.append(torch.autograd.grad((values * upstream).sum(), (hidden, weight)))
    for one, other in [found, *zip(*gradients, strict=True)]:
        assert (one - other).abs().max() <= tolerance * other.abs().max()


def test_each_token_has_its_temperature_and_its_gradient() -> None:
    """On the CPU liger-kernel computes the same in torch."""
    pytest.importorskip("liger_kernel", reason="needs the extra liger")
    compare("cpu", torch.float32, 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_so_it_is_in_the_kernel() -> None:
    head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False)
    with torch.autocast("cuda", torch.bfloat16):
        if not fused_head.usable(head, None, torch.device("cuda")):
            pytest.skip("needs a Hopper GPU, and the extra liger")
    compare("cuda", torch.bfloat16, 0.02)


def test_it_is_not_used_on_a_cpu() -> None:
    head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False)
    assert not fused_head.usable(head, None, torch.device("cpu"))
