"""Models: whether a source exists, can be loaded, and fits; whether fetched models are whole."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mulligan import models
from mulligan.cli.doctor.disks import available_memory, gigabytes
from mulligan.cli.doctor.finding import Finding, Topic
from mulligan.common.errors import DomainError
from mulligan.common.model_files import UnsupportedModel, check_model, is_hub_id
from mulligan.models.catalog import CATALOG, FetchableModel, default_folder
from mulligan.models.fetch import is_there
from mulligan.trainer.estimate.memory import Training, memory
from mulligan.trainer.estimate.shapes import UnknownShape, shape_of
from mulligan.trainer.settings import RunSettings

_FETCH = "Correct the name, or fetch the model again."
_TOKENS = 768  # of a micro-batch on the CPU, as the trainer has it without a setting


def check_source(source: str) -> Finding:
    """Whether what a setting names exists and holds a model."""
    topic = Topic("model", source)
    try:
        found = models.locate(source)
        check_model(found)
    except UnsupportedModel as error:
        return topic.problem(f"{error}.", _FETCH)
    if is_hub_id(found):
        return topic.skipped("It is an id of the hub: its files come when it is loaded.")
    return topic.ok(f"{found} holds a model, and its files can be read.")


def check_fetched(catalog: Iterable[FetchableModel] = CATALOG.values()) -> list[Finding]:
    """Compares fetched models with their checksums."""
    found = []
    for model in catalog:
        topic = Topic("model", model.name)
        folder = default_folder(model.name)
        if not folder.exists():
            found.append(topic.skipped("It was not fetched."))
        elif is_there(model, folder):
            found.append(topic.ok(f"It lies in {folder}, with the right checksums."))
        else:
            said = f"{folder} is not {model.name} as it was fetched."
            remedy = f"Remove {folder}, then run `mulligan models fetch {model.name}`."
            found.append(topic.problem(said, remedy))
    return found


def check_fit(settings: RunSettings) -> Finding:
    """Whether training fits into the memory of this machine's CPU, by the estimate of `mulligan train --dry-run`."""
    topic = Topic("memory", "training")
    if not settings.trains:
        return topic.skipped("The recipe trains nothing.")
    try:
        shape, _ = shape_of(settings.model.source)
        needed = memory(shape, Training.of(settings, shape), _TOKENS, checkpointing=True, on_gpu=False).total
    except (UnknownShape, UnsupportedModel) as error:
        return topic.skipped(f"How much memory the model takes is not known: {error}.")
    except DomainError as error:
        return topic.problem(f"{error}.", "Correct this setting of the recipe.")
    return judge_fit(topic, needed, available_memory())


def judge_fit(topic: Topic, needed: float, available: int | None) -> Finding:
    if available is None:
        return topic.skipped(f"Training takes about {gigabytes(needed)}; what is free here is not known.")
    if needed > available:
        said = f"Training takes about {gigabytes(needed)} on the CPU, and {gigabytes(available)} are free here."
        remedy = "Choose a smaller model or LoRA, or train on a GPU: `mulligan train --dry-run` says on which."
        return topic.warning(said, remedy)
    return topic.ok(f"Training takes about {gigabytes(needed)} on the CPU; {gigabytes(available)} are free.")


def needed_on_disk(settings: RunSettings | None) -> int:
    """Bytes of a checkpoint and of weights that are sent; 0 if that is not known."""
    if settings is None or not settings.trains:
        return 0
    try:
        shape, _ = shape_of(settings.model.source)
        trained = Training.of(settings, shape).trained_parameters(shape)
    except (UnknownShape, UnsupportedModel, DomainError):
        return 0
    return (12 + 4) * trained  # weights and two moments in float32, and weights that are sent


def local_folders(sources: Iterable[str]) -> list[str]:
    """Of models that services have, those that lie in a folder of this machine."""
    return [one for one in dict.fromkeys(sources) if one in models.EMBEDDED_MODELS or Path(one).is_dir()]
