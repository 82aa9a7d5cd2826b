"""AdamW with moments of 8 bits: torchao's (arXiv 2110.02861), with the extra `adam8bit`.
https://docs.pytorch.org/ao/stable/api_reference/generated/torchao.optim.AdamW8bit.html

A moment is a code of one byte for each value, and a float32 scale for each block of values. A block lies within a row
of the weight. So rows can be shared out to processes, and gathered, without being coded again.

Some moments stay float32: those of small weights, of weights whose rows no block divides, and of weights whose rows
cannot be shared out evenly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import gcd
from typing import cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torchao.optim import AdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit

from mulligan.trainer.learner.optimizer import Optimizer, arguments, split
from mulligan.trainer.settings import OptimizerSettings

_BLOCKS = (32, 256)  # values with one scale: at least, at most
_SMALL = 4096  # values of a weight; torchao's limit, and that of bitsandbytes
_SIGNED = {"exp_avg": True, "exp_avg_sq": False}


class _AdamW(AdamW8bit):
    """torchao's own blocks cross rows."""

    blocks: Mapping[Tensor, int]  # of each parameter: the values of a block; 0: its moments are float32

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        block = self.blocks[p]
        return OptimState8bit.zeros(p.shape, signed, block, p.device, p.dtype) if block else torch.zeros_like(p)


class Adam8bit(Optimizer):
    """Of weights that are shared out, each process has its rows in a plain tensor. torchao knows DTensors, but torch
    keeps what it compiles for them by their whole shape, also where processes have shares of different sizes."""

    def __init__(self, trainable: Mapping[str, Parameter], settings: OptimizerSettings):
        self.trainable = trainable
        self._rows = {name: Parameter(_local(parameter).detach()) for name, parameter in trainable.items()}
        self.torch_optimizer = _AdamW(list(self._rows.values()), **arguments(settings))
        self.torch_optimizer.blocks = {self._rows[name]: _block(parameter) for name, parameter in trainable.items()}

    def step(self, rate: float) -> None:
        for name, parameter in self.trainable.items():
            rows = self._rows[name]
            rows.data = _local(parameter).detach()
            rows.grad = None if parameter.grad is None else _local(parameter.grad)
        self.torch_optimizer.param_groups[0]["lr"].fill_(rate)
        self.torch_optimizer.step()
        self.torch_optimizer.zero_grad()

    def stored(self) -> dict[str, Tensor]:
        """As in the base class; moments of 8 bits are NAME/SLOT.codes, in the shape of the weight, and
        NAME/SLOT.scale, of rows × blocks."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.trainable.items():
            for slot, value in self.torch_optimizer.state.get(self._rows[name], {}).items():
                key = f"{name}/{slot}"
                if isinstance(value, OptimState8bit):
                    found[f"{key}.codes"] = _shared_out(value.codes, parameter)
                    found[f"{key}.scale"] = _shared_out(value.scale.view(len(value.codes), -1), parameter)
                else:
                    found[key] = value if slot == "step" else _shared_out(value, parameter)
        return found

    def restore(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        stored = dict(tensors)
        self.torch_optimizer.state.clear()
        for key, tensor in stored.items():
            name, slot = split(key)
            place, _, part = slot.partition(".")
            rows = self._rows[name]
            if not part:
                self.torch_optimizer.state[rows][place] = _local(tensor)
            elif part == "codes":
                scale = _local(stored[f"{name}/{place}.scale"])
                self.torch_optimizer.state[rows][place] = self._moment(rows, _SIGNED[place], _local(tensor), scale)

    def _moment(self, rows: Tensor, signed: bool, codes: Tensor, scale: Tensor) -> Tensor:
        """From what was stored of it. It is float32 if a new one would be."""
        found: Tensor = self.torch_optimizer._new_buffer(rows, signed)
        if isinstance(found, OptimState8bit):
            found.codes.copy_(codes)
            found.scale.copy_(scale.flatten())
        else:
            block = codes.shape[1:].numel() // scale.shape[1]
            values = OptimState8bit.zeros((block,), signed, block, codes.device).qmap[codes.int()]
            found.copy_((values.view(*scale.shape, block) * scale[..., None]).view_as(found))
        return found


def problem(device: torch.device) -> str:
    """Why a step fails on the device, if it does. torchao compiles the step, which takes a compiler of C++."""
    probe = Parameter(torch.zeros(64, _SMALL // 64, device=device))
    probe.grad = torch.zeros_like(probe)
    optimizer = _AdamW([probe])
    optimizer.blocks = {probe: _block(probe)}
    try:
        optimizer.step()
    except Exception as error:  # noqa: BLE001 - compilers fail in many ways
        return f"{type(error).__name__}: {error}".partition("\n")[0][:300]
    return ""


def _block(parameter: Tensor) -> int:
    """The values of a block of the parameter's moments; 0 if they are float32."""
    block = gcd(parameter.shape[1:].numel(), _BLOCKS[1]) if parameter.dim() > 1 else 0
    even = not isinstance(parameter, DTensor) or parameter.shape[0] % parameter.device_mesh.size() == 0
    return block if block >= _BLOCKS[0] and parameter.numel() >= _SMALL and even else 0


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _shared_out(rows: Tensor, like: Tensor) -> Tensor:
    """A process's rows as part of a tensor that is shared out as `like` is."""
    if not isinstance(like, DTensor):
        return rows
    whole = torch.empty(like.shape[0], *rows.shape[1:], device="meta")
    shared = DTensor.from_local(
        rows, like.device_mesh, like.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
    return cast(Tensor, shared)
