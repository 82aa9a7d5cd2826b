"""What the pages and the terminal share: filters by their words, experiences of the journal, numbers as text."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from mulligan.common.experience import Experience
from mulligan.common.files import user_folder
from mulligan.console.index import ExperienceFilter
from mulligan.trainer.journal import journal_file, read_experiences, slot_of, step_of


def index_file(folder: Path) -> Path:
    """The file of the index of a folder's experiences, in the user's cache. Raises RuntimeError for a user without a
    home folder."""
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    return user_folder("XDG_CACHE_HOME", ".cache") / "console" / f"{name}.sqlite"


def wanted_of(run: str, given: Mapping[str, str]) -> ExperienceFilter:
    """By the words of a page's address. A value that is no number counts as not given."""
    return ExperienceFilter(
        run,
        step=whole(given.get("step")),
        slot=whole(given.get("slot")),
        environment=given.get("environment", ""),
        role=given.get("role", ""),
        outcome=given.get("outcome", ""),
        reward_from=real(given.get("from")),
        reward_to=real(given.get("to")),
        text=given.get("text", ""),
    )


def experience_of(journal: Path, name: str) -> Experience | None:
    """The experience with this id; None where the journal has none."""
    try:
        file = journal_file(journal, step_of(name))
        if not file.exists():
            return None
    except (ValueError, OSError):  # no such id; a number that is too long for a name
        return None
    return next((one for one in read_experiences(file) if one.experience_id == name), None)


def members_of(journal: Path, step: int, slot: int) -> list[Experience]:
    """The experiences of a group; [] where the journal has none."""
    file = journal_file(journal, step)
    return [one for one in read_experiences(file) if slot_of(one.experience_id) == slot] if file.exists() else []


def whole(text: str | None) -> int | None:
    """None also for what SQLite cannot hold."""
    try:
        found = int(text or "")
    except ValueError:
        return None
    return found if -(2**63) <= found < 2**63 else None


def real(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.3g}"
