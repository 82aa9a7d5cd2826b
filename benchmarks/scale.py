"""The learner at the shape of a model of four billion parameters, on GPUs: `python -m benchmarks.scale [--quick]`.

`torchrun --nproc-per-node 8 -m benchmarks.scale` measures eight processes of one machine with a GPU each. The weights
are random, and nothing is downloaded. All weights or a LoRA of rank 16 are trained in bfloat16 with gradient
checkpointing, on rows of 16k and 64k tokens that share nothing; each process has two rows in each optimizer step. Then
comes a batch as ERL makes it, in which sequences begin alike: once with each prefix computed once, and once without.

MFU counts what the model needs, not what is computed again, and only the pairs of tokens that causal attention sees.
The peak is torch's `max_memory_allocated`; beside it is the estimate of `mulligan train --dry-run`. What by that
estimate does not fit is not run. Without a CUDA device only the estimates are printed. `--device cpu --shape tiny` runs
everything within seconds, to see that it works.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
from mulligan.trainer.learner.batching import length
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
# Tokens of a task's prompt, an attempt and a reflection, in the batch of ERL; and the most that are computed at once.
ERL = {"4b": (1024, 1024, 512), "tiny": (16, 16, 8)}
ERL_AT_ONCE = {"4b": 16_384, "tiny": 128}
CHAINS = 4  # of a task
TASKS_EACH = 2  # of a process
LOSS = ppo.Settings(kl_coefficient=0.0)
HEAD = ["trained", "batch", "GPUs", "tokens/s", "MFU", "peak GiB", "estimated GiB", ""]


@dataclass(frozen=True)
class Batch:
    """What is measured: the data of an optimizer step of so many GPUs, and how they are computed."""

    name: str
    tokens: int  # computed at once
    data: Callable[[int], list[Datum]]
    sharing: bool = True
    is_alike: bool = False  # the sequences begin alike, so the model's FLOPs are not known by their lengths


@dataclass(frozen=True)
class ScaleFigures:
    """One way on one batch. Figures that were not measured are None, and `note` says why."""

    trained: str
    batch: str
    gpus: int
    estimated_gib: float  # per GPU
    tokens_per_second: float | None = None  # of all GPUs, each sequence counted alone
    mfu: float | None = None
    peak_gib: float | None = None  # of the first GPU
    note: str = ""


def main() -> None:
    arguments = parsed()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    batches = batches_of(arguments)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        gpus = int(os.environ.get("WORLD_SIZE", "1"))  # of torchrun
        if os.environ.get("RANK", "0") == "0":
            print("no CUDA device")
            report(arguments, [planned(arguments, way, batch, gpus) for way in arguments.ways for batch in batches])
        return
    torch.set_num_threads(1)
    ranks = Ranks.join(arguments.device) if launched() else Ranks()
    folder = Path(ranks.first(mkdtemp))
    config = {**SHAPES[arguments.shape], "max_position_embeddings": max(batch.tokens for batch in batches) + 1}
    try:
        ranks.first(lambda: str(random_model(folder, config, arguments.device, torch.bfloat16)))
        found = [one for way in arguments.ways for one in measured(arguments, folder, ranks, way, batches)]
    finally:
        if ranks.is_first:
            shutil.rmtree(folder)
    if ranks.is_first:
        report(arguments, found)
    elif ranks.size > 1:
        ranks.next_call()  # the first process ends the others
    ranks.leave()


def batches_of(arguments: argparse.Namespace) -> list[Batch]:
    rows = arguments.rows or ROWS[arguments.shape]
    found = [Batch(f"rows of {row:,}", row, partial(rows_of, row)) for row in rows]
    alike = partial(erl_batch, *ERL[arguments.shape])
    at_once = ERL_AT_ONCE[arguments.shape]
    return [
        *found,
        Batch("ERL, prefixes once", at_once, alike, is_alike=True),
        Batch("ERL, each sequence alone", at_once, alike, sharing=False, is_alike=True),
    ]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--shape", choices=list(SHAPES), default="4b")
    parser.add_argument("--attention", choices=["auto", "flex", "sdpa"], default="auto", help="of shared prefixes")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="what is trained")
    parser.add_argument("--rows", nargs="+", type=int, help="tokens of a row; those of the shape unless given")
    return parser.parse_args()


def training_of(way: str) -> Training:
    lora = WAYS[way]
    return Training(rank=lora.rank if lora else 0)


def planned(arguments: argparse.Namespace, way: str, batch: Batch, gpus: int, **more: object) -> ScaleFigures:
    shape = shape_from(SHAPES[arguments.shape])
    on_gpu = arguments.device == "cuda"
    found = memory(shape, training_of(way), batch.tokens, gpus=gpus, checkpointing=True, on_gpu=on_gpu)
    return ScaleFigures(way, batch.name, gpus, found.total / 2**30, **more)  # type: ignore[arg-type]


def measured(
    arguments: argparse.Namespace, folder: Path, ranks: Ranks, way: str, batches: Sequence[Batch]
) -> Iterator[ScaleFigures]:
    """The figures of each batch, with one learner. Batches that by the estimate do not fit are not run."""
    on_gpu = arguments.device == "cuda"
    room = torch.cuda.get_device_properties(0).total_memory if on_gpu else float("inf")
    plans = {batch.name: planned(arguments, way, batch, ranks.size) for batch in batches}
    learner: Learner | None = None
    for batch in batches:
        plan = plans[batch.name]
        if plan.estimated_gib * 2**30 > room:
            yield replace(plan, note="not run: does not fit by the estimate")
            continue
        try:
            learner = learner or learner_of(arguments, folder, ranks, way)
            say(ranks, f"{way}, {batch.name}:")
            times, peak = timed(learner, batch, ranks, 2 if arguments.quick else 4, on_gpu=on_gpu)
        except torch.OutOfMemoryError:
            if ranks.size > 1:  # the other processes wait for this one, and end with it
                raise
            yield replace(plan, note="out of memory")
            continue
        rate = sum(map(length, batch.data(ranks.size))) / median(times[1:])  # the first is warm-up
        mfu = None if batch.is_alike else utilisation(arguments, way, batch.tokens, rate / ranks.size)
        done = replace(plan, tokens_per_second=rate, mfu=mfu, peak_gib=peak)
        say(ranks, str(done))
        yield done


def say(ranks: Ranks, text: str) -> None:
    """Progress, once for all processes."""
    if ranks.is_first:
        print(text, file=sys.stderr, flush=True)


def learner_of(arguments: argparse.Namespace, folder: Path, ranks: Ranks, way: str) -> Learner:
    settings = LearnerServerSettings(
        folder / "weights",
        folder / "checkpoints",
        device=arguments.device,
        threads=1,
        gradient_checkpointing=True,
        attention=arguments.attention,
        models_folder=folder,
    )
    spec = LearnerSpec(TrainedModelSettings(source=str(folder / "model"), lora=WAYS[way], dtype="bfloat16"))
    return Learner("scale", spec, settings, ranks)


def rows_of(row: int, gpus: int) -> list[Datum]:
    """Rows of random tokens, of which all but the first are trained."""
    rng = random.Random(0)
    count = ROWS_EACH * gpus
    return [datum(rng, words(rng, row + 1), row, 1 / count / row) for _ in range(count)]


def erl_batch(prompt: int, attempt: int, reflection: int, gpus: int) -> list[Datum]:
    """The four samples of each chain: first attempt; reflection, after prompt and attempt; second attempt, after
    prompt and reflection; and the second attempt after the prompt alone. The chains of a task have its prompt."""
    rng = random.Random(0)
    data: list[Datum] = []
    for _ in range(TASKS_EACH * gpus):
        asked = words(rng, prompt)
        for _ in range(CHAINS):
            first, second = words(rng, attempt), words(rng, attempt)
            reflected = words(rng, reflection)
            data.append(datum(rng, (*asked, *first), attempt, 1e-5))
            data.append(datum(rng, (*asked, *first, *reflected), reflection, 1e-5))
            data.append(datum(rng, (*asked, *reflected, *second), attempt, 1e-5))
            data.append(datum(rng, (*asked, *second), attempt, 1e-5))
    return data


def words(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(TINY["vocab_size"]) for _ in range(count))


def datum(rng: random.Random, tokens: tuple[int, ...], trained: int, weight: float) -> Datum:
    """Its last tokens are trained."""
    objective = PolicyGradient(rng.choice([-1.0, 1.0]), (-6.0,) * trained)
    mask = (False,) * (len(tokens) - trained) + (True,) * trained
    return Datum("", tokens, mask, weight, 1.0, objective, "first")


def timed(
    learner: Learner, batch: Batch, ranks: Ranks, rounds: int, *, on_gpu: bool
) -> tuple[list[float], float | None]:
    """The seconds of each round, and the peak of the GPU's memory in GiB."""
    data = batch.data(ranks.size)
    learner.server = replace(learner.server, microbatch_tokens=batch.tokens)
    learner.model.shares_prefixes = batch.sharing
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        learner.forward_backward(data, LOSS)
        learner.optim_step()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        say(ranks, f"  round {len(times)} of {rounds}: {times[-1]:.2f} s")
    return times, torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None


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
            one.batch,
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
