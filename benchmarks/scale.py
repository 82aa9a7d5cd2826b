"""The learner at the shape of a model of four billion parameters, on GPUs: `python -m benchmarks.scale [--quick]`.

`torchrun --nproc-per-node 8 -m benchmarks.scale` measures eight processes of one machine with a GPU each. The weights
are random, and nothing is downloaded. All weights or a LoRA of rank 16 are trained in bfloat16 with gradient
checkpointing, on rows of 16k and 64k tokens that share nothing; each process has two rows in each optimizer step.

MFU counts what the model needs, not what is computed again, and only the pairs of tokens that causal attention sees.
The peak is torch's `max_memory_allocated`; beside it is the estimate of `mulligan train --dry-run`. What by that
estimate does not fit is not run. Without a CUDA device only the estimates are printed. `--device cpu --shape tiny` runs
everything within seconds, to see that it works.
"""

from __future__ import annotations

import argparse
import gc
import logging
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import structlog
import torch

from benchmarks.common import median, print_result, print_table
from benchmarks.policy.shapes import random_model
from mulligan.trainer.data import Datum, PolicyGradient
from mulligan.trainer.estimate.memory import Training, memory
from mulligan.trainer.estimate.shapes import QWEN3_4B, shape_from
from mulligan.trainer.estimate.work import GPUS, sequence_flops
from mulligan.trainer.learner.learner import Learner
from mulligan.trainer.learner.ranks import Ranks, launched
from mulligan.trainer.learner.settings import LearnerServerSettings, LearnerSpec
from mulligan.trainer.losses import ppo
from mulligan.trainer.settings import LoraSettings, TrainedModelSettings

TINY: Mapping[str, Any] = {
    **QWEN3_4B,
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
SHAPES = {"4b": QWEN3_4B, "tiny": TINY}
ROWS = {"4b": [16_384, 65_536], "tiny": [128, 512]}  # tokens
WAYS = {"full": None, "lora-16": LoraSettings(rank=16)}
ROWS_EACH = 2  # of a process, in an optimizer step
LOSS = ppo.Settings(kl_coefficient=0.0)
HEAD = ["trained", "row", "GPUs", "tokens/s", "MFU", "peak GiB", "estimated GiB", ""]


@dataclass(frozen=True)
class ScaleFigures:
    """One way on rows of one length. Figures that were not measured are None, and `note` says why."""

    trained: str
    row: int  # tokens
    gpus: int
    estimated_gib: float  # per GPU
    tokens_per_second: float | None = None  # of all GPUs
    mfu: float | None = None
    peak_gib: float | None = None  # of the first GPU
    note: str = ""


def main() -> None:
    arguments = parsed()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    plans = [(way, row) for way in arguments.ways for row in arguments.rows or ROWS[arguments.shape]]
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device")
        report(arguments, [planned(arguments, way, row, 1) for way, row in plans])
        return
    torch.set_num_threads(1)
    ranks = Ranks.join(arguments.device) if launched() else Ranks()
    folder = Path(ranks.first(mkdtemp))
    config = {**SHAPES[arguments.shape], "max_position_embeddings": max(row for _, row in plans) + 1}
    try:
        ranks.first(lambda: str(random_model(folder, config, arguments.device, torch.bfloat16)))
        found = [measured(arguments, folder, ranks, way, row) for way, row in plans]
    finally:
        if ranks.is_first:
            shutil.rmtree(folder)
    if ranks.is_first:
        report(arguments, found)
    elif ranks.size > 1:
        ranks.next_call()  # the first process ends the others
    ranks.leave()


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--shape", choices=list(SHAPES), default="4b")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="what is trained")
    parser.add_argument("--rows", nargs="+", type=int, help="tokens of a row; those of the shape unless given")
    return parser.parse_args()


def training_of(way: str) -> Training:
    lora = WAYS[way]
    return Training(rank=lora.rank if lora else 0)


def planned(arguments: argparse.Namespace, way: str, row: int, gpus: int, **more: object) -> ScaleFigures:
    shape = shape_from(SHAPES[arguments.shape])
    on_gpu = arguments.device == "cuda"
    found = memory(shape, training_of(way), row, gpus=gpus, checkpointing=True, on_gpu=on_gpu)
    return ScaleFigures(way, row, gpus, found.total / 2**30, **more)  # type: ignore[arg-type]


def measured(arguments: argparse.Namespace, folder: Path, ranks: Ranks, way: str, row: int) -> ScaleFigures:
    plan = partial(planned, arguments, way, row, ranks.size)
    on_gpu = arguments.device == "cuda"
    if on_gpu and plan().estimated_gib * 2**30 > torch.cuda.get_device_properties(0).total_memory:
        return plan(note="not run: does not fit by the estimate")
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    settings = LearnerServerSettings(
        folder / "weights",
        folder / "checkpoints",
        device=arguments.device,
        threads=1,
        microbatch_tokens=row,
        gradient_checkpointing=True,
    )
    spec = LearnerSpec(TrainedModelSettings(source=str(folder / "model"), lora=WAYS[way], dtype="bfloat16"))
    try:
        learner = Learner("scale", spec, settings, ranks)
        times = [
            timed(learner, rows_of(row, ROWS_EACH * ranks.size), on_gpu) for _ in range(2 if arguments.quick else 4)
        ]
    except torch.OutOfMemoryError:
        if ranks.size > 1:  # the other processes wait for this one, and end with it
            raise
        return plan(note="out of memory")
    rate = ROWS_EACH * ranks.size * row / median(times[1:])  # the first is warm-up
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    return plan(tokens_per_second=rate, mfu=utilisation(arguments, way, row, rate / ranks.size), peak_gib=peak)


def rows_of(row: int, count: int) -> list[Datum]:
    """Rows of random tokens, of which all but the first are trained."""
    rng = random.Random(0)
    data = []
    for index in range(count):
        tokens = tuple(rng.randrange(TINY["vocab_size"]) for _ in range(row + 1))
        objective = PolicyGradient(rng.choice([-1.0, 1.0]), (-6.0,) * row)
        data.append(Datum(str(index), tokens, (False,) + (True,) * row, 1 / count / row, 1.0, objective, "first"))
    return data


def timed(learner: Learner, data: Sequence[Datum], on_gpu: bool) -> float:
    start = time.perf_counter()
    learner.forward_backward(data, LOSS)
    learner.optim_step()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def utilisation(arguments: argparse.Namespace, way: str, row: int, rate: float) -> float | None:
    """Of one GPU's peak, at so many tokens per second. None for a device whose peak is not known here."""
    if arguments.device != "cuda":
        return None
    name = torch.cuda.get_device_name().upper()
    peak = next((gpu.bfloat16 for key, gpu in GPUS.items() if key.upper() in name), None)
    flops = sequence_flops(shape_from(SHAPES[arguments.shape]), training_of(way), row, row)
    return None if peak is None else flops.model / row * rate / peak


def report(arguments: argparse.Namespace, found: Sequence[ScaleFigures]) -> None:
    def shown(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    rows = [
        [
            one.trained,
            f"{one.row:,}",
            str(one.gpus),
            shown(one.tokens_per_second, ",.0f"),
            shown(one.mfu, ".1%"),
            shown(one.peak_gib, ".1f"),
            shown(one.estimated_gib, ".3g"),
            one.note,
        ]
        for one in found
    ]
    print_table(HEAD, rows)
    has_gpu = arguments.device == "cuda" and torch.cuda.is_available()
    device = torch.cuda.get_device_name() if has_gpu else None if arguments.device == "cuda" else "cpu"
    print_result(
        "scale",
        {
            "shape": arguments.shape,
            "device": device,
            "torch": torch.__version__,
            "ways": [asdict(one) for one in found],
        },
    )


if __name__ == "__main__":
    main()
