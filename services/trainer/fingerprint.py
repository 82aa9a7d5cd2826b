"""What tells an environment from another one of the same name.

A server that was started again with another seed or other settings shows it in what it says of the environment, in the
lists of task ids, or in what tasks show first.
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

# Words for people, and what a run doesn't use.
_INCIDENTAL = ("description", "unavailable", "can_fork")
_EXCERPT = 200  # characters


class Fingerprint(msgspec.Struct, frozen=True):
    """As a run's folder keeps it. `observations`, by task id, are what these tasks show first; none where the
    environment is not deterministic."""

    info: dict[str, Any]  # fields by dotted name
    tasks: dict[str, str]  # SHA-256 of the ids that the run uses, by split
    observations: dict[str, str]

    def differences(self, now: Fingerprint) -> list[str]:
        """In words; of what both know."""
        found = [f"{name} was {_shown(old)} and is {_shown(new)}" for name, old, new in _changed(self.info, now.info)]
        found += [f"the list of tasks to {split} on is another" for split, *_ in _changed(self.tasks, now.tasks)]
        for task_id, old, new in _changed(self.observations, now.observations):
            found.append(f"task {task_id!r} showed {_shown(old)} first and shows {_shown(new)}")
        return found


async def fingerprint(
    environment: EnvironmentPort, info: EnvironmentInfo, tasks: Mapping[Split, Sequence[TaskInfo]]
) -> Fingerprint:
    """Starts an episode of a few tasks, and ends it. A task that cannot be started tells nothing."""
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
    """Equal for equal texts alone."""
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
