"""Weights on disk as the servers load them: for each version a folder with a configuration and safetensors."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from mulligan.common.disk import writing_to
from mulligan.common.errors import DomainError, Reason
from mulligan.common.files import open_to_group
from mulligan.common.inference import WeightsKind
from mulligan.policy import adapter_config
from mulligan.policy.backend import WeightsFile
from mulligan.policy.backends._servers import ServerSettings
from mulligan.policy.backends._servers.skeleton import ADAPTER_FILE, Skeleton

# Of the adapters on a server: those of the policy that sets its weights, and those of a policy that is a guest there.
OWN_PREFIX = "mulligan-"
GUEST_PREFIX = "guest-mulligan-"
ORIGINAL = "original"
# What a server calls the weights that its model came with: as this module names them, or as it was started.
_ORIGINALS = re.compile(r"\d+-original(-unchecked)?|default")
_FULL = "full"
_ADAPTERS = "adapters"


@dataclass(slots=True, eq=False)
class TargetWeights:
    """The weights that every server must hold, by the names that the servers know. `label` is the weight_version of the
    base weights. `adapter` is the name of a LoRA adapter, which is never used for another version.

    `path` is empty for the weights that the model came with. `generation` counts the updates.
    """

    weights: WeightsFile
    label: str
    path: str = ""
    adapter: str = ""
    adapter_path: str = ""
    generation: int = 0
    running: int = 0  # requests


def known_as(label: str, *, guest: bool) -> str:
    """What the policy calls the weights to which a server gives this label. To a guest it does not matter what the
    server calls the original ones."""
    return ORIGINAL if guest and _ORIGINALS.fullmatch(label) else label


class Folders:
    """Nothing else uses `folder`. What an earlier process left in it is removed."""

    def __init__(self, settings: ServerSettings, folder: Path, skeleton: Skeleton, first_version: int):
        self._root = (settings.folder or folder).resolve()
        self._in_engine = settings.folder_in_engine or str(self._root)
        self._shared = settings.folder is not None
        self._skeleton = skeleton
        # Two services with one shared folder must not remove each other's.
        self._name = f"weights-{secrets.token_hex(4)}" if self._shared else "weights"
        if not self._shared:
            shutil.rmtree(self._root / self._name, ignore_errors=True)
        self.is_guest = settings.is_guest
        self.prefix = GUEST_PREFIX if self.is_guest else OWN_PREFIX
        self.original_label = self._original_label(first_version)

    def _original_label(self, policy_version: int) -> str:
        return ORIGINAL if self.is_guest else f"{policy_version}-{ORIGINAL}"

    def original(self, policy_version: int) -> TargetWeights:
        weights = WeightsFile(None, WeightsKind.ORIGINAL, policy_version, "")
        return TargetWeights(weights, label=self._original_label(policy_version))

    def prepare(self, weights: WeightsFile) -> TargetWeights:
        """Verifies the file and puts it where the servers can find it.

        Raises DomainError MODEL_MISMATCH, WEIGHTS_NOT_FOUND or DISK_FULL.
        """
        if weights.path is None:
            target = self.original(weights.policy_version)
            target.weights = weights
            return target
        label = f"{weights.policy_version}-{weights.sha256[:12]}"
        if weights.kind is WeightsKind.FULL and self.is_guest:
            raise DomainError(Reason.MODEL_MISMATCH, "adapters_only: this policy takes no full weights")
        if weights.kind is WeightsKind.FULL:
            self._skeleton.check_full(weights.path)
            with self._new(_FULL, label) as folder:
                self._skeleton.config.to_json_file(folder / "config.json")
                self._put(weights.path, folder / "model.safetensors")
            return TargetWeights(weights, label, path=self._engine_path(folder))
        # A new name: a server would load an adapter again that a late request names, although it was unloaded.
        name = f"{self.prefix}{label}-{secrets.token_hex(4)}"
        adapter_path = self.put_adapter(weights.path, name)
        return TargetWeights(weights, self.original_label, adapter=name, adapter_path=adapter_path)

    def put_adapter(self, source: Path, name: str) -> str:
        """Puts an adapter where the servers can find it, and returns its folder as they see it. Raises as `prepare`."""
        config, tensors = self._skeleton.check_adapter(source)
        with self._new(_ADAPTERS, name) as folder:
            if tensors:
                save_file(tensors, folder / ADAPTER_FILE)
            else:
                self._put(source / ADAPTER_FILE, folder / ADAPTER_FILE)
            (folder / adapter_config.NAME).write_text(json.dumps(config))
        return self._engine_path(folder)

    def remove(self, target: TargetWeights) -> None:
        """Removes the files of weights that no server will load again."""
        for path in filter(None, (target.path, target.adapter_path)):
            relative = Path(path).relative_to(self._in_engine)
            shutil.rmtree(self._root / relative, ignore_errors=True)

    def close(self) -> None:
        shutil.rmtree(self._root / self._name, ignore_errors=True)

    @contextmanager
    def _new(self, kind: str, name: str) -> Iterator[Path]:
        """A new folder to fill. It is removed if that fails."""
        folder = self._root / self._name / kind / f"{name}-{secrets.token_hex(4)}"
        try:
            with writing_to(self._root):
                folder.mkdir(parents=True)
                yield folder
                if self._shared:
                    self._open_to_group(folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _open_to_group(self, folder: Path) -> None:
        """The servers may run as another user, who is of the group of the folder that they share with this service."""
        for path in (folder.parents[1], folder.parent, folder, *folder.rglob("*")):
            if path.stat().st_uid == os.geteuid():  # a link may be to a file of the trainer's user
                open_to_group(path)

    def _engine_path(self, folder: Path) -> str:
        return f"{self._in_engine.rstrip('/')}/{folder.relative_to(self._root).as_posix()}"

    def _put(self, source: Path, path: Path) -> None:
        """Makes a hard link, so that gigabytes are not copied. On another file system it copies the file if the
        folder is shared with the servers, else it makes a symbolic link."""
        try:
            os.link(source.resolve(), path)
        except FileNotFoundError as error:
            raise DomainError(Reason.WEIGHTS_NOT_FOUND, f"{source.name} does not exist") from error
        except OSError:  # another file system
            if self._shared:
                shutil.copyfile(source, path)
            else:
                path.symlink_to(source.resolve())
