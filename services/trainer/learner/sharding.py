"""A model whose weights are shared out to the processes of a learner: FSDP2, torch's `fully_shard`.

Each process keeps a part of every weight, of its gradient and of the optimizer's state, as DTensors. A layer's weights
are gathered when the layer runs. https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html

The loss is a sum over all data, so gradients are added up; FSDP would average them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from mulligan.trainer.learner.ranks import Ranks

T = TypeVar("T")
_PASS = "whole_pass"  # the method of a sharded model that FSDP runs as it runs `forward`


def moved(model: Any, device: torch.device, ranks: Ranks) -> Any:
    """The model on the device. With several processes it stays in main memory until it is shared out."""
    return model.to(device) if ranks.size == 1 else model


def share_out(model: Any, ranks: Ranks) -> None:
    """With several processes: leaves each its part, on its device. The layers follow one another, so the device never
    holds the whole model."""
    if ranks.size == 1:
        return
    layers = set(getattr(model, "_no_split_modules", None) or ())
    for module in model.modules():
        if type(module).__name__ in layers:
            fully_shard(module, mesh=ranks.mesh, reshard_after_forward=True)
    # Weights that stay gathered after a forward pass would be old ones after an optimizer step.
    fully_shard(model, mesh=ranks.mesh, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply while it sums
    setattr(model, _PASS, _run)
    register_fsdp_forward_method(model, _PASS)


def _run(work: Callable[[], T]) -> T:
    return work()


def whole_pass(model: Any, work: Callable[[], T]) -> T:
    """Runs `work`, which may use all parts of the model: the layers, and the weights outside of them, such as the
    head. If it returns a tensor, a backward pass may follow from there, and from no other."""
    run: Callable[[Callable[[], T]], T] = getattr(model, _PASS, _run)
    return run(work)


def refill(model: Any, parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Within a whole pass: the parameters get these values, part by part."""
    model.reshard()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
    model.unshard()


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered from all processes if each has a part. All of them must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def received(tensor: Tensor, like: Tensor | None, device: torch.device, ranks: Ranks) -> Tensor:
    """The first process's tensor on the device, in every process: shared out as `like` is, if that is a DTensor with as
    many rows. The other processes give a tensor of the same shape and type."""
    if ranks.size == 1:
        return tensor.to(device)
    if isinstance(like, DTensor) and like.shape[:1] == tensor.shape[:1]:
        return distribute_tensor(tensor.to(device), like.device_mesh, like.placements)
    ranks.broadcast(tensor)
    return tensor.to(device)
