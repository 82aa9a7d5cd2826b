"""The report of a finished run: a few lines and a chart."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from mulligan.cli.connection import command
from mulligan.cli.progress import SUCCESS, roles_in
from mulligan.cli.recipes import RECIPES
from mulligan.trainer.client import RunInfo
from mulligan.trainer.events import Entry, EvaluationEvent, StepEvent
from mulligan.trainer.memory_settings import MemoryReaders
from mulligan.trainer.settings import RunSettings

RECORDED = ".summary.json"  # what a recipe's run ended with, beside the recipe


@dataclass(frozen=True)
class RecordedRun:
    """A run of a recipe of the package that was measured before."""

    recipe: str
    evaluations: Sequence[dict[str, Any]]


def recorded_rlvr(settings: RunSettings) -> RecordedRun | None:
    """RLVR of the same model on the same task, measured before; none beside RLVR itself."""
    for file in sorted(RECIPES.glob(f"*{RECORDED}")):
        name = file.name.removesuffix(RECORDED)
        other = RunSettings.model_validate(tomllib.loads((RECIPES / f"{name}.toml").read_text(encoding="utf-8")))
        same = (other.environment, other.model) == (settings.environment, settings.model)
        if same and other.algorithm.name == "rlvr" != settings.algorithm.name:
            return RecordedRun(name, json.loads(file.read_text())["evaluations"])
    return None


def result_lines(summary: dict[str, Any], rlvr: RecordedRun | None) -> Iterator[str]:
    before = summary["test_success_before"]
    after = summary["test_success_after"]
    readers = MemoryReaders(summary["settings"]["algorithm"].get("memory_readers", MemoryReaders.REFLECTOR))
    context = "the memory" if readers.play else "no reflection"
    told = " → ".join("lost" if success is None else f"{success:.2f}" for success in (before, after))
    yield f"success on the test tasks, first attempt, {context} in context: {told}"
    yield (
        f"{summary['steps']} steps, {summary['rollouts']:,} rollouts (episodes + reflections), "
        f"{summary['sampled_tokens']:,} sampled tokens, {summary['train_seconds']:.0f} s of training"
    )
    if rlvr is not None:
        point = at_budget(rlvr.evaluations, summary["rollouts"])
        yield (
            f"RLVR at the same budget: {point['success']:.2f} ({point['rollouts']:,} rollouts; recorded, measure it "
            f"again with: {command('demo', '--folder', 'runs/rlvr', '--recipe', rlvr.recipe)})"
        )


def next_steps(run: RunInfo) -> Iterator[str]:
    """Commands to go on with after a demo, with remarks."""
    folder = Path(run.folder)
    settings = run.settings
    yield command("experiences", run.folder, "--step", str(min(10, settings.steps - 1)))
    served = ("--folder", str(folder.parents[1]), "--model", settings.model.source)
    yield f"{command('up', *served)}   then, in another terminal:"
    yield f"{command('runs')}, {command('memory', 'list')},"
    yield command("eval", settings.environment, "--run", run.run_id, *_measured_by(settings))
    yield f"your own model: {command('policy', 'load', 'actor', '--model', 'FOLDER')}, then"
    yield command("train", "RECIPE", "--set", "model.source=FOLDER")


def _measured_by(settings: RunSettings) -> Iterator[str]:
    """Options of `mulligan eval` with which it measures as the run does."""
    given = settings.evaluation
    options = {"tasks": given.tasks, "samples": given.samples, "temperature": given.temperature, "top-p": given.top_p}
    for name, value in {**options, "top-k": given.top_k, "max-tokens": settings.rollout.max_tokens}.items():
        yield from (f"--{name}", str(value))


def at_budget(evaluations: Sequence[dict[str, Any]], rollouts: int) -> dict[str, Any]:
    """The evaluation with the number of rollouts nearest to a budget."""
    return min(evaluations, key=lambda point: abs(int(point["rollouts"]) - rollouts))


def draw_chart(path: Path, entries: Sequence[Entry], rlvr: RecordedRun | None) -> None:
    """Success over the budget: test tasks, and the episodes of training by their roles, as means of a few steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = {entry.event.step: entry.event.metrics for entry in entries if isinstance(entry.event, StepEvent)}
    spent = [0.0, *accumulate(steps[step]["rollouts"] for step in sorted(steps))]
    evaluations = [entry.event for entry in entries if isinstance(entry.event, EvaluationEvent)]
    tests = {event.step: event.success for event in evaluations if not event.environment}
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    for role in roles_in({name for metrics in steps.values() for name in metrics}):
        name = f"{SUCCESS}{role}"
        points = [(spent[step + 1], metrics[name]) for step, metrics in sorted(steps.items()) if name in metrics]
        axes.plot(*_smooth(points), alpha=0.5, label=f"training, {role}")
    axes.plot(
        [spent[step] for step in sorted(tests)], [tests[step] for step in sorted(tests)], "o-", label="test tasks"
    )
    if rlvr is not None:
        spent_rlvr = [point["rollouts"] for point in rlvr.evaluations]
        success = [point["success"] for point in rlvr.evaluations]
        axes.plot(spent_rlvr, success, "s--", label="test tasks, RLVR (recorded)")
    axes.set(xlabel="rollouts: episodes + reflections", ylabel="success", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _smooth(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Means of consecutive points, about twenty of them."""
    width = max(1, len(points) // 20)
    chunks = [points[index : index + width] for index in range(0, len(points), width)]
    return (
        [chunk[-1][0] for chunk in chunks],
        [sum(value for _, value in chunk) / len(chunk) for chunk in chunks],
    )
