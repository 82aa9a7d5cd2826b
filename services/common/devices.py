"""Devices as torch names them, and whether this machine has them. torch is not imported here: callers bring it, or what
another process said of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mulligan.common.suggest import did_you_mean
from mulligan.common.text import bounded

KINDS = ("cpu", "cuda")
_NO_CUDA = "install a build of torch for CUDA, or set device to cpu"
_NO_GPU = "look at nvidia-smi and at CUDA_VISIBLE_DEVICES (a container needs --gpus all), or set device to cpu"
_OTHER_NAMES = {"gpu": "cuda", "nvidia": "cuda", "rocm": "cuda", "hip": "cuda"}
_NAME = re.compile(r"([a-z]+)(?::([0-9]{1,3}))?")
_SHOWN = 100  # characters of a name


def parse_device(name: str, kinds: Sequence[str] = KINDS) -> tuple[str, int]:
    """The kind of `cuda` or `cuda:1`, and its number, which is 0 where there is none. Raises ValueError, which says
    what there is."""
    found = _NAME.fullmatch(name)
    if found and found[1] in kinds:
        return found[1], int(found[2] or 0)
    said = name.partition(":")[0].strip().lower()
    near = did_you_mean(_OTHER_NAMES.get(said, said), kinds) if said not in kinds or said != name else ""
    raise ValueError(f"no such device {bounded(name, _SHOWN)!r}: expected {', '.join(kinds)} or cuda:NUMBER{near}")


@dataclass(frozen=True, slots=True)
class TorchDevices:
    """What torch sees on this machine. `other` is the kind of an accelerator that is no GPU of CUDA, such as mps."""

    version: str
    built_for_gpus: bool
    gpus: int
    other: str = ""

    @classmethod
    def seen_by(cls, torch: Any) -> TorchDevices:
        """`torch` is the module."""
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        kind = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else ""
        built = bool(torch.version.cuda or torch.version.hip)
        return cls(torch.__version__, built, gpus, kind if kind not in KINDS else "")

    def problem(self, name: str, *, others: bool = False) -> str:
        """Why nothing can be computed on the device of this name, and what to do; empty if it is there. `others`:
        whether accelerators that are no GPUs of CUDA will do, too."""
        return ": ".join(filter(None, self.examined(name, others=others)))

    def examined(self, name: str, *, others: bool = False) -> tuple[str, str]:
        """As `problem`, with what to do apart; that is empty where another name is needed."""
        kinds = [*KINDS, self.other] if others and self.other else KINDS
        try:
            kind, number = parse_device(name, kinds)
        except ValueError as error:
            return str(error), ""
        if kind != "cuda":
            return "", ""
        if not self.gpus and not self.built_for_gpus:
            return f"{name!r} needs a GPU, and torch {self.version} was built without CUDA", _NO_CUDA
        if not self.gpus:
            return f"{name!r} needs a GPU, and torch {self.version} sees none", _NO_GPU
        if number >= self.gpus:
            last = f"the last of which is cuda:{self.gpus - 1}"
            return f"no such device {name!r}: torch sees {counted(self.gpus)}, {last}", ""
        return "", ""

    def lacks_for(self, processes: int) -> str:
        """Why so many processes of a learner cannot have a GPU each; empty if they can."""
        if processes <= self.gpus:
            return ""
        return (
            f"{processes} processes need a GPU each, and torch sees {counted(self.gpus)} on this machine: "
            f"expected at most {self.gpus}, or device = cpu"
        )


def counted(gpus: int) -> str:
    return f"{gpus} GPU" if gpus == 1 else f"{gpus} GPUs"
