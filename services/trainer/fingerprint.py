"""The fingerprint of an environment: its description, its task ids, and the first observations of a few tasks.

It differs after a restart of the server with another seed or other settings.
"""

from __future__ import annotations

import contextlib
import hashlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import msgspec

from mulligan.common.errors import CallFailed, DomainError
from mulligan.common.types import EnvironmentInfo, Split, TaskInfo
from mulligan.trainer.interfaces import EnvironmentPort

# Texts for people, and what a run does not use.
_INCIDENTAL = ("description", "unavailable", "can_fork")
_EXCERPT = 200  # characters


class Fingerprint(msgspec.Struct, frozen=True):
    """As stored in a run's folder. `observations` maps task ids to first observations; empty if the environment is not
    deterministic."""

    info: dict[str, Any]  # fields by dotted name
    tasks: dict[str, str]  # SHA-256 of the ids that the run uses, by split
    observations: dict[str, str]

    def differences(self, now: Fingerprint) -> list[str]:
        """Sentences for people, about what both fingerprints contain."""
        found = [f"{name} was {_shown(old)} and is {_shown(new)}" for name, old, new in _changed(self.info, now.info)]
        found += [f"the list of {split} tasks has changed" for split, *_ in _changed(self.tasks, now.tasks)]
        for task_id, old, new in _changed(self.observations, now.observations):
            found.append(f"task {task_id!r} showed {_shown(old)} first and shows {_shown(new)}")
        return found


async def fingerprint(
    environment: EnvironmentPort, info: EnvironmentInfo, tasks: Mapping[Split, Sequence[TaskInfo]]
) -> Fingerprint:
    """Starts and ends an episode of the first and last task of each split. Tasks that cannot start are left out."""
    plain = {name: value for name, value in asdict(info).items() if name not in _INCIDENTAL}
    ids = {str(split): [task.task_id for task in listed] for split, listed in tasks.items()}
    chosen = dict.fromkeys(task_id for listed in ids.values() for task_id in (listed[:1] + listed[-1:]))
    observations = {}
    for task_id in chosen if info.deterministic else ():
        with contextlib.suppress(DomainError, CallFailed):
            episode = await environment.start(info.name, task_id, f"fingerprint-{uuid.uuid4().hex}")
            observations[task_id] = brief(episode.observation)
            await episode.end()
    digests = {split: hashlib.sha256("\n".join(listed).encode()).hexdigest() for split, listed in ids.items()}
    return Fingerprint(_flat(msgspec.json.decode(msgspec.json.encode(plain))), digests, observations)


def brief(text: str) -> str:
    """The text, or its beginning and SHA-256. Only equal texts give equal results."""
    if len(text) <= _EXCERPT:
        return text
    return f"{text[:_EXCERPT]}… (SHA-256 {hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()})"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(name, old, now[name]) for name, old in before.items() if name in now and now[name] != old]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 2 * _EXCERPT else f"{text[: 2 * _EXCERPT]}…"
