"""AdamW (arXiv 1711.05101) over the trained weights, and its state in checkpoints.

The weights are float32. So are their moments, unless `optimizer.moments` is "8bit": then see `adam8bit`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from mulligan.common.errors import invalid_field
from mulligan.common.extras import MissingExtra
from mulligan.trainer.settings import OptimizerSettings


class Optimizer:
    """Torch's AdamW. The parameters may be shared out to several processes."""

    def __init__(self, trainable: Mapping[str, Parameter], settings: OptimizerSettings):
        self.trainable = trainable
        self.torch_optimizer: Any = torch.optim.AdamW(list(trainable.values()), **arguments(settings), fused=True)

    def step(self, rate: float) -> None:
        """Moves the weights along the accumulated gradient, with this learning rate."""
        self.torch_optimizer.param_groups[0]["lr"] = rate
        self.torch_optimizer.step()

    def clear_gradient(self) -> None:
        for parameter in self.trainable.values():
            parameter.grad = None

    def stored(self) -> dict[str, Tensor]:
        """The state as tensors, by the names NAME/SLOT, such as "model.norm.weight/exp_avg"."""
        return {
            f"{name}/{slot}": value
            for name, parameter in self.trainable.items()
            for slot, value in self.torch_optimizer.state.get(parameter, {}).items()
        }

    def restore(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces the state by what `stored` gave. The tensors are shared out as their parameters are."""
        self.torch_optimizer.state.clear()
        for key, tensor in tensors:
            name, slot = split(key)
            self.torch_optimizer.state[self.trainable[name]][slot] = tensor


def create(trainable: Mapping[str, Parameter], settings: OptimizerSettings, device: torch.device) -> Optimizer:
    """Raises DomainError INVALID_FIELD for moments that need what is not installed."""
    if settings.moments == "float32":
        return Optimizer(trainable, settings)
    try:
        from mulligan.trainer.learner import adam8bit
    except ImportError as error:
        missing = MissingExtra("adam8bit", error)
        raise invalid_field("optimizer.moments", f"float32, or what 8bit needs: it {missing}") from error
    if problem := adam8bit.problem(device):
        expected = f"float32, or what 8bit needs: torch.compile, which fails here ({problem})"
        raise invalid_field("optimizer.moments", expected)
    return adam8bit.Adam8bit(trainable, settings)


def arguments(settings: OptimizerSettings) -> dict[str, Any]:
    """Those that all of torch's Adams have."""
    return {
        "lr": settings.learning_rate,
        "betas": (settings.beta1, settings.beta2),
        "weight_decay": settings.weight_decay,
    }


def split(key: str) -> tuple[str, str]:
    """The parameter's name and the slot of a stored tensor."""
    name, _, slot = key.rpartition("/")
    return name, slot
