"""Whether ERL on 3×3 FrozenLake ends as well when steps overlap: `rollout.max_staleness` 0, 1 and 2, five seeds each.

The runs without overlap are those of the comparison of methods, `methods/erl-SEED`; these have the same settings.
`python -m proof.staleness` prints the table of docs/architecture.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from mulligan.trainer.events import EventLog
from proof.methods import ARMS, RESULTS, STEPS, chosen, train

BOUNDS = (1, 2)
SEEDS = 5


def learn(bound: int, seed: int, folder: Path) -> dict[str, Any]:
    """One run; the ages are over the samples of all steps, in steps."""
    erl = ARMS["erl"]
    rate = chosen("erl", erl)["rate"]
    arm = replace(erl, settings=(f"rollout.max_staleness={bound}",))
    run = train(arm, [f"steps={STEPS}", f"seed={seed}", f"optimizer.learning_rate={rate}"], folder)
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    steps = [event.metrics for _, event in sorted(EventLog(run / "events.jsonl").steps().items())]
    return {
        "max_staleness": bound,
        "seed": seed,
        "rate": rate,
        "oldest": max(step["staleness_max"] for step in steps),
        "mean_age": round(fmean(step["staleness_mean"] for step in steps), 3),
        "waiting_for_rollouts_seconds": round(sum(step["waiting_for_rollouts_seconds"] for step in steps), 1),
        "waiting_for_learner_seconds": round(sum(step["waiting_for_learner_seconds"] for step in steps), 1),
        "train_success": [round(step.get("success_first", 0.0), 4) for step in steps],
        **{name: value for name, value in summary.items() if name != "run_id"},
    }


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    f"staleness/erl-{bound}-{seed}": partial(learn, bound, seed) for bound in BOUNDS for seed in range(SEEDS)
}


def p_value(first: Sequence[float], second: Sequence[float]) -> float:
    """Of the exact two-sided permutation test of the means: the share of all divisions of the values into groups of
    these sizes whose means differ by as much."""
    values = [*first, *second]

    def difference(places: Sequence[int]) -> float:
        others = [value for place, value in enumerate(values) if place not in places]
        return abs(fmean(values[place] for place in places) - fmean(others))

    observed = difference(range(len(first)))
    divisions = list(combinations(range(len(values)), len(first)))
    return sum(difference(places) >= observed - 1e-12 for places in divisions) / len(divisions)


def main() -> None:
    print("| S | five seeds, sorted | mean | p | age of samples: mean, greatest |\n|---|---|---|---|---|")
    apart: list[float] = []
    for bound in (0, *BOUNDS):
        name = f"staleness/erl-{bound}" if bound else "methods/erl"
        runs = [json.loads((RESULTS / f"{name}-{seed}.json").read_text()) for seed in range(SEEDS)]
        after = sorted(run["test_success_after"] for run in runs)
        apart = apart or after
        told = f"{p_value(apart, after):.2f}" if bound else ""
        age = fmean(run.get("mean_age", 0.0) for run in runs)
        oldest = max(run.get("oldest", 0.0) for run in runs)
        shown = ", ".join(f"{success:.3f}" for success in after)
        print(f"| {bound} | {shown} | {fmean(after):.3f} | {told} | {age:.2f}, {oldest:g} |")


if __name__ == "__main__":
    main()
