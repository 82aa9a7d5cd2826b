"""`python -m mulligan.models.recipe --out models/embedded`: trains the embedded model from nothing and measures it."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads are ten times slower on a shared machine

import torch
from transformers.utils import logging

from mulligan.models.build import build_model, build_tokenizer
from mulligan.models.recipe.report import write_report
from mulligan.models.recipe.train import Schedule, Warmup


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mulligan.models.recipe", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=Schedule.steps, help="optimizer steps (fewer only to try it out)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure-boards", type=int, default=100, help="test boards to measure on; 0 skips measuring")
    options = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    model = build_model(options.seed)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(options.out)
    started = time.monotonic()
    warmup = Warmup(model, Schedule(steps=options.steps, seed=options.seed))
    warmup.run(lambda line: print(line, flush=True), save=lambda _: model.save_pretrained(options.out))
    training = {
        "command": "python -m mulligan.models.recipe --out models/embedded "
        f"--steps {options.steps} --seed {options.seed}",
        "steps": options.steps,
        "seconds": round(time.monotonic() - started),
        "threads": options.threads,
        "tokens": warmup.tokens,
    }
    if options.measure_boards:
        figures = write_report(options.out, model, tokenizer, training, options.measure_boards)
        print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
