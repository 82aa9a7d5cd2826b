"""Prints by how many bytes training raises the memory of a process: `python -m benchmarks.learner.peak`.

Two steps are taken, each the gradient of a recorded batch and AdamW: the optimizer's moments are there from the first
step on, so the second has the peak. The model is loaded within what is measured, the imports before. Linux only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.learner.batches import recorded
from benchmarks.learner.with_trl import TrlStep
from mulligan.trainer.learner.allocator import return_freed_memory
from mulligan.trainer.learner.learner import Learner
from mulligan.trainer.learner.settings import LearnerServerSettings, LearnerSpec
from mulligan.trainer.losses import ppo
from mulligan.trainer.settings import LoraSettings, TrainedModelSettings

OURS, TRL = "learner", "TRL"
STEPS = 2


def measured(way: str, model: Path, batch: Path, rows: int, lora: int, *, checkpointing: bool = False) -> int:
    """The bytes, measured in a process of its own; with `gradient_checkpointing` of the learner. Raises
    CalledProcessError."""
    options = ["--way", way, "--model", str(model), "--batch", str(batch), "--rows", str(rows), "--lora", str(lora)]
    options += ["--checkpointing"] if checkpointing else []
    command = [sys.executable, "-m", "benchmarks.learner.peak", *options]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return int(printed.splitlines()[-1])


def _ours(model: Path, batch: Path, lora: LoraSettings | None, *, checkpointing: bool) -> None:
    return_freed_memory()
    with TemporaryDirectory() as name:
        folder = Path(name)
        server = LearnerServerSettings(
            folder / "weights", folder / "checkpoints", threads=1, gradient_checkpointing=checkpointing
        )
        learner = Learner("peak", LearnerSpec(TrainedModelSettings(source=str(model), lora=lora)), server)
        for _ in range(STEPS):
            learner.forward_backward(recorded(batch), ppo.Settings(kl_coefficient=0.0))
            learner.optim_step()


def _trl(model: Path, batch: Path, rows: int, lora: LoraSettings | None) -> None:
    trainer = TrlStep(model, rows, lora)
    for _ in range(STEPS):
        trainer.step(recorded(batch))


def _resident(line: str) -> int:
    """Bytes: of now (VmRSS), or the most so far (VmHWM). (The rusage of a process begins with that of its parent.)"""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{line}:")[1].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--way", choices=(OURS, TRL), required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--batch", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=8, help="of a micro-batch of TRL")
    parser.add_argument("--lora", type=int, default=0, help="rank; 0: full weights")
    parser.add_argument("--checkpointing", action="store_true", help="the learner's gradient_checkpointing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lora = LoraSettings(rank=arguments.lora) if arguments.lora else None
    if arguments.way == TRL:
        import trl.trainer.grpo_trainer  # noqa: F401 - not measured
    before = _resident("VmRSS")
    if arguments.way == OURS:
        _ours(arguments.model, arguments.batch, lora, checkpointing=arguments.checkpointing)
    else:
        _trl(arguments.model, arguments.batch, arguments.rows, lora)
    print(_resident("VmHWM") - before)


if __name__ == "__main__":
    main()
