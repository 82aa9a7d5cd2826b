"""SmolLM2-135M-Instruct writes short sentences: ERL, RLVR at ERL's budget, and no training, on the same test tasks.

`python -m benchmarks.language_model` makes the table and the chart.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mulligan.cli.local import LocalServices
from mulligan.cli.progress import EvaluationDisplay
from mulligan.cli.train import read_settings
from mulligan.common.channel import Endpoint
from mulligan.models.catalog import default_folder
from mulligan.trainer.client import RunClient
from mulligan.trainer.folder import RunFolder
from mulligan.trainer.journal import journal_file, journaled_steps, read_experiences
from mulligan.trainer.settings import RunSettings
from proof import CaseUnavailable
from proof.methods import ROOT, Arm, step_metrics, train
from proof.second_attempts import solved

MODEL = "smollm2-135m"
EVERY = 4  # steps between evaluations
ARMS = {"erl": Arm("short-sentences-smollm2"), "rlvr": Arm("short-sentences-smollm2-rlvr")}
# Of the evaluations of the model as it comes: other seeds than the runs have, whose first evaluation is one of it, too.
UNTRAINED_SEEDS = (100, 101, 102)
SECOND_TRIES = ("try_again", "raw_retry", "erl")  # algorithms with second attempts
SECOND_TRY_SEEDS = 3
_ADAPTER = "[model.lora]\nrank = 16\n"  # of the recipe; a run without a learner has none
_CURVES = {"train_success": "success_first", "second_success": "success_second", "groups_with_signal": ""}


def model_folder() -> Path:
    """Raises CaseUnavailable."""
    folder = default_folder(MODEL)
    if not (folder / "model.safetensors").is_file():
        raise CaseUnavailable(f"{MODEL}: `mulligan models fetch {MODEL}` fetches it")
    return folder


def learn(name: str, seed: int, folder: Path, settings: Sequence[str] = ()) -> dict[str, Any]:
    """One run of an arm in `folder`, or the rest of one that was interrupted there: its summary, and metrics of each
    step. `settings` win over the recipe's."""
    run = train(ARMS[name], [f"seed={seed}", f"evaluation.every={EVERY}", *settings], folder)
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    summary.pop("run_id")
    steps = step_metrics(run)
    curves = {
        told: [round(steps[step].get(metric or told, 0.0), 4) for step in sorted(steps)]
        for told, metric in _CURVES.items()
    }
    return {"arm": name, "seed": seed, **curves, **summary}


def untrained(seed: int, folder: Path) -> dict[str, Any]:
    """First attempts of the model as it comes, measured as the runs of the arms measure theirs."""
    run = read_settings(Path(ARMS["erl"].recipe), [f"seed={seed}"])

    async def measured() -> dict[str, Any]:
        async with LocalServices(folder, model=run.model.source) as services:
            return await evaluate(services.endpoint("trainer"), run)

    return {"arm": "untrained", "seed": seed, **asyncio.run(measured())}


async def evaluate(trainer: Endpoint, run: RunSettings) -> dict[str, Any]:
    """What the policy of a trainer does now on the test tasks of a run, with the run's seed."""
    client = RunClient(trainer)
    try:
        with EvaluationDisplay(run.environment) as display:
            result, _ = await client.evaluate(
                run.environment,
                run.evaluation,
                seed=run.seed,
                max_tokens=run.rollout.max_tokens,
                on_progress=display.update,
            )
    finally:
        await client.close()
    return {
        "test_success": result.success,
        "attempts": result.attempts,
        "excluded": result.excluded,
        "max_tokens": run.rollout.max_tokens,
        "evaluation": run.evaluation.model_dump(mode="json"),
    }


def second_tries(seed: int, folder: Path) -> dict[str, Any]:
    """How often the model as it comes solves a task after a first failure: told only that, told its attempt and the
    feedback, and after a reflection, as ERL has it."""
    recipe = (ROOT / "recipes" / f"{ARMS['erl'].recipe}.toml").read_text()
    assert _ADAPTER in recipe
    without_learner = folder / "second-tries.toml"
    without_learner.parent.mkdir(parents=True, exist_ok=True)
    without_learner.write_text(recipe.replace(_ADAPTER, ""))
    settings = [f"seed={seed}", "learner=none", "evaluation.every=0", "steps=2", "rollout.tasks_per_step=24"]
    ways = {}
    for name in SECOND_TRIES:
        run = train(Arm(str(without_learner)), [*settings, f"algorithm.name={name}"], folder / name)
        journal = RunFolder(run).journal
        steps = journaled_steps(journal)
        experiences = [one for step in steps for one in read_experiences(journal_file(journal, step))]
        ways[name] = {
            "first_attempts": len(experiences),
            "first_solved": sum(solved(one, "first") for one in experiences),
            "second_attempts": sum(one.sample("second") is not None for one in experiences),
            "second_solved": sum(solved(one, "second") for one in experiences),
        }
    return {"arm": "second-tries", "seed": seed, "ways": ways}


def _with_model(measure: Callable[[Path], dict[str, Any]], folder: Path) -> dict[str, Any]:
    model_folder()
    return measure(folder)


def _cases() -> Iterator[tuple[str, Callable[[Path], dict[str, Any]]]]:
    for seed in UNTRAINED_SEEDS:
        yield f"language-model/untrained-{seed}", partial(_with_model, partial(untrained, seed))
    for seed in range(SECOND_TRY_SEEDS):
        yield f"language-model/second-tries-{seed}", partial(_with_model, partial(second_tries, seed))
    for name, arm in ARMS.items():
        for seed in range(arm.seeds):
            yield f"language-model/{name}-{seed}", partial(_with_model, partial(learn, name, seed))


CASES = dict(_cases())
