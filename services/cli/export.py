"""`mulligan export`: the weights that a run learned, as a folder that transformers loads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from mulligan.cli.byte_line import ByteLine
from mulligan.cli.connection import command
from mulligan.cli.found_run import found_run
from mulligan.cli.out import fail, note, show
from mulligan.common.errors import DomainError, Reason
from mulligan.common.suggest import problems
from mulligan.trainer.folder import RunFolder, RunRecord
from mulligan.trainer.settings import LearnerKind, TrainedModelSettings

if TYPE_CHECKING:
    from mulligan.trainer.learner.export import Exported

_MANIFEST = "manifest.json"
_STEP = re.compile(r"-([0-9]+)")


def export(
    run: Annotated[
        str, typer.Argument(help="A run's folder, or that of a checkpoint; or its id, if it is in RUNS or below.")
    ],
    folder: Annotated[Path, typer.Argument(help="A new or an empty folder.")],
    merge: Annotated[bool, typer.Option("--merge", help="With LoRA: whole weights that contain the adapter.")] = False,
    step: Annotated[
        int | None, typer.Option(help="The checkpoint after so many steps; the run's last one if not given.", min=0)
    ] = None,
    model: Annotated[
        str, typer.Option(help="Where the model lies that was trained, if not where the run's settings say.")
    ] = "",
    runs: Annotated[
        Path, typer.Option(envvar="MULLIGAN_TRAINER_RUNS_FOLDER", help="Where runs are looked for by their id.")
    ] = Path("runs"),
    checkpoints: Annotated[
        Path | None,
        typer.Option(
            envvar="MULLIGAN_TRAINER_CHECKPOINT_FOLDER",
            help="The trainer's folder of checkpoints, if it does not lie beside that of the runs.",
        ),
    ] = None,
) -> None:
    """Write what a run learned as a folder for transformers, SGLang or vLLM: weights, configuration and tokenizer. With
    LoRA it has the adapter, as peft reads it; with --merge, whole weights. It needs no server.

    Example: `mulligan export runs/demo/runs/demo-1 my-model`
    """
    try:
        path, named = _find(run, runs)
        record = RunFolder(path).record()
        settings = _model_settings(record, model, merge=merge)
        found = _checkpoint(RunFolder(path), record.run_id, named, step, checkpoints)
        origin = {"run": record.run_id, "checkpoint": found.name}
        done = _export(settings, found, folder.absolute(), origin, merge=merge)
    except DomainError as error:
        is_model = error.reason in (Reason.MODEL_NOT_FOUND, Reason.UNSUPPORTED_MODEL)
        fail(f"{error}; --model names another place of it" if is_model and not model else error)
    kind = "an adapter" if done.is_adapter else "whole weights"
    note(f"{record.run_id} after {done.optimizer_steps} optimizer steps: {kind} of {done.parameters:,} parameters")
    if not done.is_adapter:
        note(f"serve it: {command('up', '--model', str(folder))}")
    show(str(folder))


def _export(
    settings: TrainedModelSettings, checkpoint: Path, folder: Path, origin: dict[str, Any], *, merge: bool
) -> Exported:
    with ByteLine("getting ready"):
        from mulligan.trainer.learner.export import ExportRefused
        from mulligan.trainer.learner.export import export as write
    try:
        with ByteLine("getting ready") as display:
            return write(settings, checkpoint, folder, display.update, merge=merge, record=origin)
    except ExportRefused as error:
        fail(error, 2)


def _find(run: str, runs: Path) -> tuple[Path, Path | None]:
    """The folder of the run, and that of the checkpoint if `run` is one."""
    folder = Path(run)
    if (folder / _MANIFEST).is_file():
        return _run_of(folder.absolute()), folder.absolute()
    return found_run(run, runs, nor=f" and no checkpoint (it has {_MANIFEST})"), None


def _run_of(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint is of."""
    root = checkpoint.parents[1]
    places = [place / checkpoint.parent.name for place in (root.parent / "runs", root.parent)]
    found = next((place for place in places if RunFolder(place).exists), None)
    if found is None:
        fail(
            f"{checkpoint} is a checkpoint of {checkpoint.parent.name}, and its run is neither in {places[0]} nor in "
            f"{places[1]}: name the run's folder, which says what model was trained, and --checkpoints {root}",
            2,
        )
    return found


def _model_settings(record: RunRecord, model: str, *, merge: bool) -> TrainedModelSettings:
    """What the run trained. Plug-ins that its other settings name need not be there."""
    if record.settings.get("learner") == LearnerKind.NONE:
        fail(f'run {record.run_id} has learner = "none": it changed no weights, and has none to export', 2)
    try:
        settings = TrainedModelSettings.model_validate(record.settings.get("model", {}))
    except ValidationError as error:
        field, said = next(iter(problems(error, TrainedModelSettings).items()))
        fail(f"run {record.run_id} cannot be read here: model.{field}: {said}", 2)
    if merge and settings.lora is None:
        fail(f"--merge: run {record.run_id} trained the weights themselves (no model.lora): there is no adapter", 2)
    if not model:
        return settings
    return TrainedModelSettings(source=model, lora=settings.lora, dtype=settings.dtype)


def _checkpoint(folder: RunFolder, run_id: str, named: Path | None, step: int | None, root: Path | None) -> Path:
    if named is not None:
        if step is not None:
            fail(f"--step: {named.name} is a checkpoint already", 2)
        return named
    last = folder.checkpoint() if step is None else None
    beside = (folder.path.parents[1] / "checkpoints", folder.path.parent / "checkpoints")
    roots = [root] if root is not None else [place for place in beside if (place / run_id).is_dir()] or list(beside)
    there = {path.parent.name: path.parent for place in roots for path in (place / run_id).glob(f"*/{_MANIFEST}")}
    steps = {int(match[1]): name for name in there if (match := _STEP.fullmatch(name, len(run_id)))}
    wanted = steps.get(step) if step is not None else last.name if last is not None else None
    if wanted not in there:
        which = "no checkpoint yet" if wanted is None else f"a checkpoint {wanted}, which is gone"
        which = which if step is None else f"no checkpoint after {step} steps"
        has = f"there are those after {', '.join(map(str, sorted(steps)))} steps"
        if not steps:
            places = " or ".join(str(place / run_id) for place in roots)
            has = f"none lies in {places}; --checkpoints names another folder"
        fail(f"run {run_id} has {which}: {has}")
    return there[wanted]
