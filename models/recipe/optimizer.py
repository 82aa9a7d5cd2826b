"""Muon for the matrices in the layers, AdamW for the rest. This needs about half as many batches as AdamW alone."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic Newton–Schulz iteration of Jordan et al., Muon (2024)


class Muon:
    """Momentum with orthogonalised updates. Matrices of one shape are updated together."""

    def __init__(self, matrices: list[nn.Parameter], momentum: float = 0.95, decay: float = 0.01) -> None:
        self._groups: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for matrix in matrices:
            self._groups[matrix.shape].append(matrix)
        self._momenta = {shape: torch.zeros(len(group), *shape) for shape, group in self._groups.items()}
        self._momentum = momentum
        self._decay = decay

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        for shape, group in self._groups.items():
            gradients = torch.stack([matrix.grad for matrix in group if matrix.grad is not None])
            momenta = self._momenta[shape].lerp_(gradients, 1 - self._momentum)
            updates = _orthogonalised(gradients.lerp(momenta, self._momentum))
            scale = 0.2 * math.sqrt(max(shape))  # makes one learning rate fit both optimizers
            for matrix, update in zip(group, updates, strict=True):
                matrix.mul_(1 - learning_rate * self._decay).add_(update, alpha=-learning_rate * scale)


def _orthogonalised(matrices: Tensor) -> Tensor:
    a, b, c = _COEFFICIENTS
    x: Tensor = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Optimizer:
    def __init__(self, model: nn.Module, extra: nn.Module) -> None:
        named = list(model.named_parameters())
        inner = [weight for name, weight in named if ".layers." in name and weight.ndim == 2]
        outer = [weight for name, weight in named if not (".layers." in name and weight.ndim == 2)]
        self._muon = Muon(inner)
        self._adam = torch.optim.AdamW([*outer, *extra.parameters()], lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
        self._all = [*inner, *outer, *extra.parameters()]

    def step(self, learning_rate: float) -> float:
        """Returns the norm of the gradient before it was clipped."""
        norm = nn.utils.clip_grad_norm_(self._all, 1.0)
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._adam.step()
        self._muon.step(learning_rate)
        for weight in self._all:
            weight.grad = None
        return float(norm)
