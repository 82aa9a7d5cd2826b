"""`python -m mulligan.models.many_symbols --out models/embedded_symbols` trains the model, and measures it."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads are ten times slower on a shared machine

import numpy as np
import torch
from transformers.utils import logging

from mulligan.models.build import build_model, build_tokenizer
from mulligan.models.many_symbols.legends import legend_batch
from mulligan.models.many_symbols.measure import measure
from mulligan.models.many_symbols.play import play_batch, trace_batch
from mulligan.models.recipe.tokens import Batch
from mulligan.models.recipe.train import Schedule, Warmup


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mulligan.models.many_symbols", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=1_800, help="optimizer steps (fewer only to try it out)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--boards", type=int, default=100, help="test boards to measure on")
    options = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    model = build_model(options.seed)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(options.out)
    started = time.monotonic()
    schedule = Schedule(steps=options.steps, seed=options.seed)
    warmup = Warmup(model, schedule, lesson)
    warmup.run(lambda line: print(line, flush=True), save=lambda _: model.save_pretrained(options.out))
    figures = {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "command": f"python -m mulligan.models.many_symbols --out models/embedded_symbols --steps {options.steps} "
        f"--seed {options.seed}",
        "seconds": round(time.monotonic() - started),
        "threads": options.threads,
        "tokens": warmup.tokens,
        "boards": options.boards,
        "success": measure(model, tokenizer, options.boards),
    }
    (options.out / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n")
    (options.out / "README.md").write_text(readme(figures))
    print(json.dumps(figures, indent=2))


def readme(figures: dict[str, Any]) -> str:
    success = figures["success"]
    memories = {
        "nothing": "no_memory",
        "the whole right legend": "whole_legend",
        "a legend that is wrong in every line": "wrong_legends",
        "another failed attempt": "another_episode",
    }
    rows = [
        f"| {memory} | {success[f'second_attempt_{name}']:.2f} | {success[f'lines_{name}']:.1f} | "
        f"{success[f'lines_right_{name}']:.2f} |"
        for memory, name in memories.items()
    ]
    return f"""\
# The model embedded-symbols

A Qwen3-shaped model of {figures["parameters"]:,} parameters with its own tokenizer. It plays FrozenLake 3×3 in which
three letters stand for holes and three for frozen tiles, by a legend of the symbols, complete or not. From a failed
attempt it writes a legend of what the attempt shows, and adds what the memory says of other symbols. It has never seen
the assignment of `frozenlake-symbols`.

Written by `{figures["command"]}` in {figures["seconds"]:,} s on a
shared machine, from {figures["tokens"]:,} tokens. Figures: {figures["boards"]} test boards, sampled at temperature 1.

| first attempt with | success |
|---|---|
| nothing | {success["first_attempt"]:.2f} |
| the whole right legend | {success["first_attempt_whole_legend"]:.2f} |
| a legend that is wrong in every line | {success["first_attempt_wrong_legends"]:.2f} |
| a failed attempt of another board | {success["first_attempt_one_episode"]:.2f} |

| memory of the reflector | second attempt | lines of its legend | of them right |
|---|---|---|---|
{chr(10).join(rows)}
"""


def lesson(rng: np.random.Generator, schedule: Schedule, step: int) -> Iterator[tuple[Batch, str]]:
    """First play alone, in short games; then legends and traces, too."""
    short = step < schedule.short_share * schedule.steps
    turns = int(rng.choice((1, 2))) if short else int(rng.choice((1, 2, 3, 4, 8)))
    yield play_batch(rng, max(4, schedule.play_tokens // (26 + 17 * turns)), turns), "play"
    if not short:
        yield legend_batch(rng, schedule.reflections), "write"
        if step % 3 == 0:
            yield trace_batch(rng, schedule.reflections // 3, 2), "trace"


if __name__ == "__main__":
    main()
