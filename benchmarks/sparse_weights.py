"""How much of the published weights changes in an optimizer step, and how large a sparse file of it is:
`python -m benchmarks.sparse_weights [--steps 8] [--model NAME]`.

A learner takes optimizer steps and publishes its weights after each, in float32 and in bfloat16. The data are a step of
ERL as the demo trained on it. Another model reads other words in these tokens. That matters little here, because Adam
moves a weight by at most about the learning rate, however large its gradient is. The first step is not counted: there,
Adam moves each weight by just the learning rate.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote, urlsplit

import structlog
import torch
from safetensors.torch import load_file

from benchmarks.common import median, print_result, print_table
from benchmarks.learner.batches import ERL_DEMO, ERL_DEMO_MINIBATCHES, recorded
from mulligan.policy.sparse_weights import SparseFile
from mulligan.trainer.batch import minibatches
from mulligan.trainer.learner.learner import Learner
from mulligan.trainer.learner.settings import LearnerServerSettings, LearnerSpec
from mulligan.trainer.losses import ppo
from mulligan.trainer.settings import OptimizerSettings, TrainedModelSettings

DTYPES = ("float32", "bfloat16")
RATES = (1e-6, 1e-5, 1e-4)


@dataclass(frozen=True)
class Change:
    """From one version to the next. `sparse` is the size of a sparse file over that of the whole one; 1 where there is
    none that is smaller."""

    values: float  # share of them that differ
    sparse: float
    seconds: float  # to find them


def changes(folder: Path, model: str, dtype: Any, rate: float, steps: int) -> Iterator[Change]:
    """One for each optimizer step after the first."""
    spec = LearnerSpec(TrainedModelSettings(source=model, dtype=dtype), OptimizerSettings(learning_rate=rate))
    learner = Learner("sparse", spec, LearnerServerSettings(folder / "weights", folder / "checkpoints", threads=1))
    calls = minibatches(recorded(ERL_DEMO), ERL_DEMO_MINIBATCHES, 0)
    before: Path | None = None
    for version in range(1, steps + 2):
        learner.forward_backward(calls[version % len(calls)], ppo.Settings(kl_coefficient=0.0))
        learner.optim_step()
        after = Path(unquote(urlsplit(learner.publish_weights(version).uri).path))
        if before is not None:
            start = time.perf_counter()
            sparse = SparseFile.between(before, after)
            seconds = time.perf_counter() - start
            share = sparse.size_bytes / after.stat().st_size if sparse is not None else 1.0
            yield Change(differing(before, after), share, seconds)
        before = after


def differing(before: Path, after: Path) -> float:
    old = load_file(before)
    new = load_file(after)
    count = sum(int((old[name] != tensor).sum()) for name, tensor in new.items())
    return count / sum(tensor.numel() for tensor in new.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps that are counted")
    parser.add_argument("--model", default="embedded", help="embedded, a fetched model or a folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    rows = []
    result: dict[str, float] = {}
    fields = ("values", "sparse", "seconds")
    for dtype in DTYPES:
        for rate in RATES:
            with TemporaryDirectory() as folder:
                found = list(changes(Path(folder), arguments.model, dtype, rate, arguments.steps))
            values, sparse, seconds = (median([getattr(change, field) for change in found]) for field in fields)
            rows.append((dtype, f"{rate:g}", f"{values:.2%}", f"{sparse:.1%}", f"{seconds:.2f}"))
            result[f"{dtype}_{rate:g}"] = round(sparse, 4)
    print_table(("published in", "learning rate", "values that change", "sparse of whole file", "s to find them"), rows)
    print_result("sparse_weights", {"model": arguments.model, "steps": arguments.steps, **result})


if __name__ == "__main__":
    main()
