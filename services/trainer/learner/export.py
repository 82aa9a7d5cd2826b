"""Writes the weights of a checkpoint as a folder that transformers and peft load: weights or adapter, configuration,
tokenizer."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mulligan import models
from mulligan.common.disk import disk_full, free_bytes, writing_to
from mulligan.common.file_lock import lock_file
from mulligan.common.files import make_folder, move_folder
from mulligan.common.fingerprint import model_fingerprint
from mulligan.common.model_files import check_model, is_hub_id
from mulligan.trainer.learner.lora import attach
from mulligan.trainer.learner.model import load_source
from mulligan.trainer.learner.storage import CheckpointState, damaged, load_checkpoint
from mulligan.trainer.learner.tensor_files import StoredTensors
from mulligan.trainer.settings import TrainedModelSettings

RECORD = "mulligan.json"  # in an exported folder: what it was made from
_WEIGHTS = "weights"
_POLL_SECONDS = 0.2
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")

# Told what is done now, how many bytes of it are there, and how many there will be; 0 if that is not known.
Progress = Callable[[str, int, int], None]


class ExportRefused(Exception):
    """The folder cannot be written to. The message says why."""


@dataclass(frozen=True, slots=True)
class Exported:
    """`parameters` are those of the model, or of the adapter alone."""

    optimizer_steps: int
    parameters: int
    is_adapter: bool


def export(
    settings: TrainedModelSettings,
    checkpoint: Path,
    target: Path,
    progress: Progress,
    *,
    merge: bool = False,
    record: dict[str, Any] | None = None,
) -> Exported:
    """Writes the checkpoint's weights, in the dtype of `settings`, to `target`, which is absent or an empty folder.

    With LoRA they are an adapter; with `merge`, whole weights that contain it. `record` is written to `RECORD`. The
    folder is written beside `target` and renamed, so that it is whole or not there. Raises ExportRefused, and
    DomainError CHECKPOINT_NOT_FOUND, CHECKPOINT_MISMATCH, MODEL_NOT_FOUND, UNSUPPORTED_MODEL, DISK_FULL.
    """
    with _beside(target) as ready:
        progress("comparing the checkpoint with its checksums", 0, 0)
        parts, state = load_checkpoint(checkpoint, only={_WEIGHTS})
        progress(f"loading {settings.source}", 0, 0)
        base, tokenizer = load_source(settings, getattr(torch, settings.dtype))
        base.eval()
        if model_fingerprint(base, tokenizer) != state.fingerprint:
            raise damaged(checkpoint.name, f"it is of another model than {settings.source} (architecture or tokenizer)")
        module = base if settings.lora is None else attach(base, settings.lora, seed=0).eval()
        _fill(module, parts.get(_WEIGHTS), checkpoint)
        is_adapter = settings.lora is not None and not merge
        if is_adapter:
            _name_base(module, settings)
            written = [parameter for parameter in module.parameters() if parameter.requires_grad]
        else:
            if settings.lora is not None:
                progress("merging the adapter", 0, 0)
                with torch.no_grad():
                    module = module.merge_and_unload()
            written = list(module.parameters())
        size = sum(parameter.nbytes for parameter in written)
        with writing_to(target.parent, size):
            if free_bytes(target.parent) < size:
                raise disk_full(target.parent, size)
            with _counted(ready, size, progress, f"writing {target}"):
                _save(module, tokenizer, ready, is_adapter=is_adapter)
            _copy_licences(settings, ready)
            _write_record(ready, settings, state, record or {})
            if not is_adapter:
                check_model(str(ready))
            progress(f"moving it to {target}", 0, 0)
            _move(ready, target)
    return Exported(state.optimizer_steps, sum(parameter.numel() for parameter in written), is_adapter)


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, on the same disk, which is removed at the end of the block unless it was moved.
    What a process that was killed left there is removed, too. Raises ExportRefused."""
    _check_target(target)
    place = target.parent / f".exporting-{target.name}"
    try:
        make_folder(place)
        held = lock_file(place / "lock")
    except BlockingIOError:
        raise ExportRefused(f"another process exports to {target} now") from None
    except OSError as error:
        raise ExportRefused(f"{error.filename or place}: {error.strerror}") from error
    with held:
        ready = place / "ready"
        try:
            shutil.rmtree(ready, ignore_errors=True)
            ready.mkdir()
            yield ready
        finally:
            shutil.rmtree(place, ignore_errors=True)


def _check_target(target: Path) -> None:
    try:
        if target.is_dir() and any(target.iterdir()):
            raise ExportRefused(f"{target} is not empty: expected a new or an empty folder")
        if target.exists() and not target.is_dir():
            raise ExportRefused(f"{target} is a file: expected a new or an empty folder")
    except OSError as error:
        raise ExportRefused(f"{error.filename or target}: {error.strerror}") from error


def _move(ready: Path, target: Path) -> None:
    try:
        move_folder(ready, target)
    except OSError as error:
        if target.exists():
            raise ExportRefused(f"{target}: {error.strerror}: expected a new or an empty folder") from error
        raise


def _fill(module: Any, weights: StoredTensors | None, checkpoint: Path) -> None:
    """Replaces what was trained by the checkpoint's weights, one tensor after the other."""
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if weights is None:
        raise damaged(checkpoint.name, "parts are missing")
    if weights.shapes != {name: list(parameter.shape) for name, parameter in trained.items()}:
        raise damaged(checkpoint.name, "other parameters were trained (full or LoRA, rank, target modules)")
    with torch.no_grad():
        for name, parameter in trained.items():
            tensor = weights[name]
            if not tensor.isfinite().all():
                raise damaged(checkpoint.name, f"{name} has values that are not finite")
            parameter.copy_(tensor)


def _name_base(adapter: Any, settings: TrainedModelSettings) -> None:
    """Says in the adapter's configuration of which model it is: a hub id with its revision, or a whole path."""
    config = adapter.peft_config["default"]
    if settings.revision:
        config.base_model_name_or_path, config.revision = settings.source, settings.revision
    elif not is_hub_id(config.base_model_name_or_path):
        config.base_model_name_or_path = str(Path(config.base_model_name_or_path).absolute())


def _save(module: Any, tokenizer: Any, folder: Path, *, is_adapter: bool) -> None:
    if is_adapter:
        module.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # peft's form of a model card, with nothing filled in
    else:
        module.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def _copy_licences(settings: TrainedModelSettings, folder: Path) -> None:
    source = Path(models.locate(settings.source, settings.revision))
    for pattern in _LICENCES:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def _write_record(folder: Path, settings: TrainedModelSettings, state: CheckpointState, record: dict[str, Any]) -> None:
    content = {**record, "optimizer_steps": state.optimizer_steps, "model": settings.model_dump(mode="json")}
    path = folder / RECORD
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for other in folder.iterdir():  # safetensors writes files that their user alone can read, whatever the umask
        other.chmod(path.stat().st_mode & 0o777)


@contextmanager
def _counted(folder: Path, total: int, progress: Progress, text: str) -> Iterator[None]:
    """Tells within the block how many bytes of `total` lie in the folder."""
    over = threading.Event()

    def count() -> None:
        while not over.wait(_POLL_SECONDS):
            with suppress(OSError):
                progress(text, min(total, sum(path.stat().st_size for path in folder.iterdir())), total)

    progress(text, 0, total)
    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
