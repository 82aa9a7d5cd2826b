"""The report of a finished run: a few lines and a chart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from mulligan.cli.connection import command
from mulligan.trainer.events import Entry, EvaluationEvent, StepEvent

RLVR = "frozenlake-3x3-rlvr"  # a recipe of the package


def result_lines(summary: dict[str, Any], rlvr: dict[str, Any] | None) -> Iterator[str]:
    before = summary["test_success_before"]
    after = summary["test_success_after"]
    yield f"success on the test boards, first attempt, no reflection in context: {before:.2f} → {after:.2f}"
    yield (
        f"{summary['steps']} steps, {summary['rollouts']:,} rollouts (episodes + reflections), "
        f"{summary['sampled_tokens']:,} sampled tokens, {summary['train_seconds']:.0f} s of training"
    )
    if rlvr is not None:
        point = at_budget(rlvr["evaluations"], summary["rollouts"])
        yield (
            f"RLVR at the same budget: {point['success']:.2f} ({point['rollouts']:,} rollouts; recorded, measure it "
            f"again with: {command('demo', '--folder', 'runs/rlvr', '--recipe', RLVR)})"
        )


def at_budget(evaluations: Sequence[dict[str, Any]], rollouts: int) -> dict[str, Any]:
    """The evaluation with the number of rollouts nearest to a budget."""
    return min(evaluations, key=lambda point: abs(int(point["rollouts"]) - rollouts))


def draw_chart(path: Path, entries: Sequence[Entry], rlvr: dict[str, Any] | None) -> None:
    """Success over the budget: test boards, and the first and second attempts of training, smoothed over ten steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = {entry.event.step: entry.event.metrics for entry in entries if isinstance(entry.event, StepEvent)}
    spent = [0.0, *accumulate(steps[step]["rollouts"] for step in sorted(steps))]
    evaluations = [entry.event for entry in entries if isinstance(entry.event, EvaluationEvent)]
    tests = {event.step: event.success for event in evaluations if not event.environment}
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    for name, label in (("success_first", "training, first attempts"), ("success_second", "training, second attempts")):
        points = [(spent[step + 1], metrics[name]) for step, metrics in sorted(steps.items()) if name in metrics]
        if points:
            axes.plot(*_smooth(points), alpha=0.5, label=label)
    axes.plot(
        [spent[step] for step in sorted(tests)], [tests[step] for step in sorted(tests)], "o-", label="test boards"
    )
    if rlvr is not None:
        curve = rlvr["evaluations"]
        spent_rlvr = [point["rollouts"] for point in curve]
        axes.plot(spent_rlvr, [point["success"] for point in curve], "s--", label="test boards, RLVR (recorded)")
    axes.set(xlabel="rollouts: episodes + reflections", ylabel="success", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _smooth(points: Sequence[tuple[float, float]], width: int = 10) -> tuple[list[float], list[float]]:
    """Means of `width` consecutive points."""
    chunks = [points[index : index + width] for index in range(0, len(points), width)]
    return (
        [chunk[-1][0] for chunk in chunks],
        [sum(value for _, value in chunk) / len(chunk) for chunk in chunks],
    )
