"""Trains every method on 3×3 FrozenLake with the embedded model, on equal terms, by `mulligan demo`.

Each arm first gets the same small search: three learning rates, 100 steps, one seed, judged by the training boards
alone. RLVR gets one over its entropy bonus, too. Then its seeds run with what was best. `python -m benchmarks.methods`
makes the table and the charts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from mulligan.trainer.events import EventLog
from proof import CaseUnavailable

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "proof"
STEPS = 200
RATES = ("3e-5", "1e-4", "3e-4")
ENTROPIES = ("0.003", "0.01")
SEARCH_SEED = 100
LAST_STEPS = 20  # of a search, over which training success is averaged


@dataclass(frozen=True)
class Arm:
    """A recipe with settings. `share` is the share of the full budget that its seeds run for."""

    recipe: str
    settings: tuple[str, ...] = ()
    seeds: int = 3
    share: float = 1.0
    entropies: tuple[str, ...] = ()
    like: str = ""  # the arm whose search it takes its settings from; its own if empty
    differs: str = ""  # how it differs from ERL or RLVR, if that is all that it is for


def _erl(differs: str, *settings: str, like: str = "") -> Arm:
    return Arm("frozenlake-3x3", settings, like=like, differs=differs)


def _rlvr(differs: str, *settings: str) -> Arm:
    return Arm("frozenlake-3x3-rlvr", settings, like="rlvr", differs=differs)


ARMS = {
    "erl": Arm("frozenlake-3x3", seeds=5),
    "rlvr": Arm("frozenlake-3x3-rlvr", seeds=5, entropies=ENTROPIES),
    "without-memory": _erl("ERL, reflections without memory", "algorithm.memory_entries=0"),
    "without-reflection": _erl("ERL, the raw attempt in place of the reflection", "algorithm.name=raw_retry"),
    "without-distillation": _erl("ERL without distillation", "algorithm.distillation_weight=0"),
    "try-again": _erl('ERL, "wrong" in place of the reflection', "algorithm.name=try_again"),
    # Why ERL learns faster: each differs from ERL or RLVR in one thing.
    "why-no-second": _erl("ERL, no gradient of second attempts", "algorithm.second_weight=0", like="erl"),
    "why-no-reflection": _erl("ERL, no gradient of reflections", "algorithm.reflection_weight=0", like="erl"),
    "why-first-and-distilled": _erl(
        "ERL, no gradient of either", "algorithm.second_weight=0", "algorithm.reflection_weight=0", like="erl"
    ),
    "why-no-first": _erl("ERL, no gradient of first attempts", "algorithm.first_weight=0", like="erl"),
    "why-rlvr-groups-of-4": _rlvr(
        "RLVR, 24 groups of 4 attempts in place of 16 of 6",
        "rollout.rollouts_per_task=4",
        "rollout.tasks_per_step=24",
    ),
    "why-rlvr-signal": _rlvr("RLVR, groups of equal rewards are replaced", "rollout.replace_rounds=2"),
    "why-no-clipping": _erl("ERL, gradients not clipped", "optimizer.max_grad_norm=1000", like="erl"),
    "why-rlvr-no-clipping": _rlvr("RLVR, gradients not clipped", "optimizer.max_grad_norm=1000"),
}


def others() -> dict[str, Arm]:
    """The methods beyond ERL and RLVR, by their recipes. They run at half the budget. A run without a learner has no
    learning rate to search for."""
    known = {arm.recipe for arm in ARMS.values()}
    files = sorted((ROOT / "recipes").glob("frozenlake-3x3-*.toml"))
    learning = [file.stem for file in files if tomllib.loads(file.read_text()).get("learner") != "none"]
    return {name.removeprefix("frozenlake-3x3-"): Arm(name, share=0.5) for name in learning if name not in known}


def search(arm: Arm, rate: str, entropy: str, folder: Path) -> dict[str, Any]:
    """Half the steps of ERL with one learning rate. The result has no number of the test boards."""
    steps = STEPS // 2
    settings = [f"steps={steps}", f"seed={SEARCH_SEED}", f"optimizer.learning_rate={rate}", "evaluation.every=0"]
    settings += [f"loss.entropy_coefficient={entropy}"] if entropy else []
    run = train(arm, settings, folder)
    curve = [metrics.get("success_first", 0.0) for _, metrics in sorted(step_metrics(run).items())]
    return {"rate": rate, "entropy": entropy, "steps": steps, "train_success": fmean(curve[-LAST_STEPS:])}


def learn(name: str, arm: Arm, seed: int, folder: Path) -> dict[str, Any]:
    """One seed with the settings that the search found. Raises CaseUnavailable before the search."""
    best = chosen(name, arm)
    settings = [f"steps={int(STEPS * arm.share)}", f"seed={seed}", f"optimizer.learning_rate={best['rate']}"]
    settings += [f"loss.entropy_coefficient={best['entropy']}"] if best["entropy"] else []
    run = train(arm, settings, folder)
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    metrics = step_metrics(run)
    return {
        "arm": name,
        "seed": seed,
        "rate": best["rate"],
        "entropy": best["entropy"],
        "optimizer_steps": summary["steps"] * summary["settings"]["algorithm"]["optimizer_steps"],
        "groups_with_signal": [round(metrics[step].get("groups_with_signal", 0.0), 4) for step in sorted(metrics)],
        "grad_norm": [round(metrics[step].get("grad_norm", 0.0), 4) for step in sorted(metrics)],
        "train_success": [round(metrics[step].get("success_first", 0.0), 4) for step in sorted(metrics)],
        **{name: value for name, value in summary.items() if name not in ("run_id",)},
    }


def chosen(name: str, arm: Arm) -> dict[str, Any]:
    """The result of the arm's search with the greatest success in training; of equal ones the first."""
    if arm.like:
        return chosen(arm.like, ARMS[arm.like])
    cases = list(searches(name, arm))
    missing = [case for case, _, _ in cases if not (RESULTS / f"{case}.json").exists()]
    if missing:
        raise CaseUnavailable(f"its search comes first: {', '.join(missing)}")
    results = [json.loads((RESULTS / f"{case}.json").read_text()) for case, _, _ in cases]
    best: dict[str, Any] = max(results, key=lambda result: float(result["train_success"]))
    return best


def searches(name: str, arm: Arm) -> Iterator[tuple[str, str, str]]:
    """Each search of an arm: its case, learning rate and entropy bonus ("": the recipe's)."""
    for rate in () if arm.like else RATES:
        for entropy in ("", *arm.entropies):
            yield f"methods/search-{name}-{rate}{'-entropy-' + entropy if entropy else ''}", rate, entropy


def train(arm: Arm, settings: list[str], folder: Path) -> Path:
    """Runs the demo in `folder`, or continues it there. Returns the folder of the run."""
    command = [sys.executable, "-m", "mulligan.cli", "demo", "--folder", str(folder), "--recipe", arm.recipe]
    for setting in (*arm.settings, *settings):
        command += ["--set", setting]
    subprocess.run(command, cwd=ROOT, check=True)
    (summary,) = folder.glob("runs/*/summary.json")
    return summary.parent


def step_metrics(run: Path) -> dict[int, dict[str, float]]:
    """Of each step of a run, by its folder."""
    return {step: event.metrics for step, event in EventLog(run / "events.jsonl").steps().items()}


def _cases() -> Iterator[tuple[str, Callable[[Path], dict[str, Any]]]]:
    for name, arm in {**ARMS, **others()}.items():
        for case, rate, entropy in searches(name, arm):
            yield case, partial(search, arm, rate, entropy)
        for seed in range(arm.seeds):
            yield f"methods/{name}-{seed}", partial(learn, name, arm, seed)


CASES = dict(_cases())
