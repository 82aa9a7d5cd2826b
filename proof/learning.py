"""Trains each algorithm on 3×3 FrozenLake with the embedded model, with several seeds, by `mulligan demo`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# The ablations differ from ERL by settings alone.
ARMS = {
    "erl": ("frozenlake-3x3.toml", ()),
    "rlvr": ("frozenlake-3x3-rlvr.toml", ()),
    "without-memory": ("frozenlake-3x3.toml", ("algorithm.memory_entries=0",)),
    "without-reflection": ("frozenlake-3x3.toml", ("algorithm.name=raw_retry",)),
    "without-distillation": ("frozenlake-3x3.toml", ("algorithm.distillation_weight=0",)),
    "try-again": ("frozenlake-3x3.toml", ("algorithm.name=try_again",)),
}
SEEDS = {"erl": 5, "rlvr": 5}
ABLATION_SEEDS = 3


def learn(arm: str, seed: int, folder: Path) -> dict[str, Any]:
    """Runs the demo in `folder`, or continues it there."""
    recipe, settings = ARMS[arm]
    command = [sys.executable, "-m", "mulligan.cli", "demo", "--folder", str(folder)]
    command += ["--recipe", str(ROOT / "recipes" / recipe), "--set", f"seed={seed}"]
    for setting in settings:
        command += ["--set", setting]
    subprocess.run(command, cwd=ROOT, check=True)
    (file,) = folder.glob("runs/*/summary.json")
    summary: dict[str, Any] = json.loads(file.read_text())
    return {"arm": arm, "seed": seed, **summary}


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    f"learning-{arm}-{seed}": partial(learn, arm, seed)
    for arm in ARMS
    for seed in range(SEEDS.get(arm, ABLATION_SEEDS))
}
