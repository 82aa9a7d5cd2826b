"""Models: whether a source exists, can be loaded, and fits; whether fetched models are whole."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mulligan import models
from mulligan.cli.doctor.disks import gigabytes
from mulligan.cli.doctor.finding import Finding, Topic
from mulligan.common.errors import DomainError
from mulligan.common.model_files import UnsupportedModel, check_model, is_hub_id
from mulligan.models.catalog import CATALOG, FetchableModel, default_folder
from mulligan.models.fetch import is_there
from mulligan.trainer.estimate.memory import Training, memory
from mulligan.trainer.estimate.shapes import UnknownShape, shape_of
from mulligan.trainer.settings import RunSettings

_FETCH = "Correct the name, or fetch the model again."
# Tokens of a micro-batch, as the trainer has them without a setting.
_TOKENS = 768
_TOKENS_GPU = 4096


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


def check_fit(settings: RunSettings, available: float | None, *, on_gpu: bool = False) -> Finding:
    """Whether training fits into so many free bytes, by the estimate of `mulligan train --dry-run`."""
    topic = Topic("memory", "training")
    if not settings.trains:
        return topic.skipped("The recipe trains nothing.")
    try:
        shape, _ = shape_of(settings.model.source)
        training = Training.of(settings, shape)
    except (UnknownShape, UnsupportedModel) as error:
        return topic.skipped(f"How much memory the model takes is not known: {error}.")
    except DomainError as error:
        return topic.problem(f"{error}.", "Correct this setting of the recipe.")
    tokens = _TOKENS_GPU if on_gpu else _TOKENS
    needed = memory(shape, training, tokens, checkpointing=True, on_gpu=on_gpu).total
    return judge_fit(topic, needed, available, "the GPU" if on_gpu else "the CPU")


def judge_fit(topic: Topic, needed: float, available: float | None, where: str) -> Finding:
    takes = f"Training takes about {gigabytes(needed)} on {where}"
    if available is None:
        return topic.skipped(f"{takes}; what is free here is not known.")
    if needed > available:
        remedy = "Choose a smaller model or LoRA, or other GPUs: `mulligan train --dry-run` says on which it fits."
        return topic.warning(f"{takes}, and {gigabytes(available)} are free.", remedy)
    return topic.ok(f"{takes}; {gigabytes(available)} are free.")


def needed_on_disk(settings: RunSettings | None) -> int:
    """Bytes of a checkpoint and of weights that are sent; 0 if that is not known."""
    if settings is None or not settings.trains:
        return 0
    try:
        shape, _ = shape_of(settings.model.source)
        training = Training.of(settings, shape)
    except (UnknownShape, UnsupportedModel, DomainError):
        return 0
    return round(training.checkpoint_bytes(shape) + training.published_bytes(shape))


def local_folders(sources: Iterable[str]) -> list[str]:
    """Of models that services have, those that lie in a folder of this machine."""
    return [one for one in dict.fromkeys(sources) if one in models.EMBEDDED_MODELS or Path(one).is_dir()]
