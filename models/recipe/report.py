"""The figures and the README that are committed with the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

from mulligan.models.recipe.measure import FIXED_SYMBOLS, Meter, legend, other_symbols, random_play
from mulligan.models.recipe.sampling import PAPER_VALIDATION, Sampling

_SAMPLINGS = {"temperature 1.0": Sampling(), "temperature 0.7, top-p 0.8, top-k 20": PAPER_VALIDATION}
_OTHERS = 20
_REPEATS = 5


def write_report(
    folder: Path,
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    training: dict[str, Any],
    boards: int,
) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "training": training,
        "measured_on": f"{boards} test boards, 3x3, 8 moves, sampled",
        "random_play": random_play(boards),
        "success": {name: _measure(Meter(model, tokenizer, how, boards)) for name, how in _SAMPLINGS.items()},
    }
    (folder / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n")
    (folder / "README.md").write_text(readme(figures))
    return figures


def _measure(meter: Meter) -> dict[str, Any]:
    repeats = [meter.first_attempts(FIXED_SYMBOLS, seed=seed)[0] for seed in range(_REPEATS)]
    others = [meter.first_attempts(symbols)[0] for symbols in other_symbols(_OTHERS)]
    wrong_memory = legend("DBEA")
    return {
        "first_attempt": round(sum(repeats) / _REPEATS, 3),
        "first_attempt_on_20_other_assignments": {
            "mean": round(sum(others) / len(others), 3),
            "min": min(others),
            "max": max(others),
        },
        "true_legend": meter.with_legend(legend(FIXED_SYMBOLS)),
        "shuffled_legend": meter.with_shuffled_legends(),
        "reflect_and_retry": {
            "empty_memory": meter.second_attempts(),
            "right_memory": meter.second_attempts(legend(FIXED_SYMBOLS)),
            "partly_wrong_memory": meter.second_attempts(wrong_memory),
        },
    }


def readme(figures: dict[str, Any]) -> str:
    rows = []
    for name, success in figures["success"].items():
        others = success["first_attempt_on_20_other_assignments"]
        retry = success["reflect_and_retry"]
        rows += [
            f"\n## Sampled at {name}\n",
            "| | success |\n|---|---|",
            f"| uniformly random moves, exactly | {figures['random_play']:.2f} |",
            f"| first attempt, no legend (mean of 5 per board) | {success['first_attempt']:.2f} |",
            f"| the same on 20 other assignments: mean (min–max) | "
            f"{others['mean']:.2f} ({others['min']:.2f}–{others['max']:.2f}) |",
            f"| true legend in the system prompt | {success['true_legend']:.2f} |",
            f"| legend with its letters shuffled | {success['shuffled_legend']:.2f} |",
        ]
        for memory, result in retry.items():
            rows.append(
                f"| second attempt on its own reflection, {memory.replace('_', ' ')} "
                f"(legends entirely right: {result['legends_entirely_right']:.2f}) | "
                f"{result['second_attempt_success']:.2f} |"
            )
    training = figures["training"]
    return (
        "# The embedded model\n\n"
        f"A Qwen3-shaped model of {figures['parameters']:,} parameters with its own tokenizer. It plays FrozenLake 3×3 "
        "by a legend of the symbols, writes such legends from failed attempts, and plays at random without one. It has "
        "never seen the assignment A player, B goal, C hole, D floor; finding that out is left to reinforcement "
        "learning.\n\n"
        f"Written by `{training['command']}` ({training['seconds']:,} s, {training['threads']} threads on a shared "
        f"machine, {training['tokens']:,} tokens). Figures: {figures['measured_on']}; `metrics.json` has them all.\n"
        + "\n".join(rows)
        + "\n"
    )
