"""Installs the package `acme` beside this folder as a distribution of its own, outside of the tree."""

from __future__ import annotations

import shutil
from pathlib import Path

_ENTRY_POINTS = """\
[mulligan.backends]
parrot = acme.parrot
broken = acme.nowhere

[mulligan.environments]
countdown = acme.countdown

[mulligan.stores]
notes = acme.notes

[mulligan.embedders]
letters = acme.letters

[mulligan.objectives]
unlikelihood = acme.unlikelihood

[mulligan.losses]
tilted = acme.tilted

[mulligan.algorithms]
persistent = acme.persistent
persistent-object = acme.objects:algorithm

[mulligan.advantages]
halved = acme.halved
halved-object = acme.objects:estimator

[mulligan.samplers]
backwards = acme.backwards
backwards-object = acme.objects:sampler

[mulligan.protocols]
ever = acme.ever
ever-object = acme.objects:protocol
"""


def install(folder: Path, entry_points: str = _ENTRY_POINTS) -> Path:
    """As pip does with --target: the package, and what describes the distribution. Returns the folder."""
    shutil.copytree(Path(__file__).parent / "acme", folder / "acme", ignore=shutil.ignore_patterns("__pycache__"))
    described = folder / "acme-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text(entry_points)
    return folder
