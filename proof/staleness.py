"""Whether ERL on 3×3 FrozenLake ends as well when steps overlap: `rollout.max_staleness` 0, 1 and 2, five seeds each.

The runs without overlap are those of the comparison of methods, `methods/erl-SEED`; these have the same settings.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from mulligan.trainer.events import EventLog
from proof.methods import ARMS, STEPS, chosen, train

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
