"""A recording: folders of runs, and what the services answered when they had ended. `mulligan ui --demo` shows the one
that the package has, without any service.

It is an archive (tar, compressed with xz) of the runs' folders and of `services.json`.
"""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from importlib.resources import as_file, files
from pathlib import Path

import msgspec

from mulligan.common.errors import ServiceUnavailable
from mulligan.common.inference import CallOptions, Completion, CompletionPart, Message, SamplingParams
from mulligan.common.reflections import Explained, StoredReflection
from mulligan.console.services import FoundPolicies, Health, ServiceAnswer

FILE = "recording.tar.xz"
ANSWERS = "services.json"  # in the archive
_NOT_HERE = "This is a recording: no service runs. Start some with `mulligan up`, and the console with `mulligan ui`."


class RecordedAnswers(msgspec.Struct, frozen=True):
    """What the services answered at the end of the recorded runs."""

    made_at: datetime
    release: str  # of Mulligan
    about: str  # what was run
    health: list[Health]
    policies: FoundPolicies
    entries: list[Explained]  # of the memory, the latest first
    prompts: dict[str, str]  # of the environments, by name

    @property
    def banner(self) -> str:
        """What each page says of the recording."""
        return f"This is a recording of {self.made_at:%Y-%m-%d}: {self.about} Nothing runs."


class RecordedServices:
    """Answers as `Services` do, by a recording. What would change something is refused."""

    def __init__(self, answers: RecordedAnswers) -> None:
        self._answers = answers

    async def health(self) -> Sequence[Health]:
        return self._answers.health

    async def policies(self) -> FoundPolicies:
        return self._answers.policies

    async def entries(self, scope: str) -> ServiceAnswer[list[StoredReflection]]:
        found = [one.reflection for one in self._answers.entries]
        return ServiceAnswer([one for one in found if scope in ("", one.scope)])

    async def entry(self, reflection_id: str) -> ServiceAnswer[Explained]:
        for one in self._answers.entries:
            if one.reflection.reflection_id == reflection_id:
                return ServiceAnswer(one)
        return ServiceAnswer(error=f"The recording has no entry {reflection_id!r}.")

    async def prompts(self) -> ServiceAnswer[dict[str, str]]:
        return ServiceAnswer(self._answers.prompts)

    async def complete(
        self, messages: tuple[Message, ...], sampling: SamplingParams, options: CallOptions
    ) -> ServiceAnswer[Completion]:
        return ServiceAnswer(error=_NOT_HERE)

    async def stream(
        self, messages: tuple[Message, ...], sampling: SamplingParams, options: CallOptions
    ) -> AsyncIterator[CompletionPart]:
        """Raises ServiceUnavailable."""
        raise ServiceUnavailable("the policy service", 0.0, _NOT_HERE)
        yield  # of no part

    async def stop(self, run_id: str) -> ServiceAnswer[object]:
        return ServiceAnswer(error=_NOT_HERE)

    async def resume(self, run_id: str) -> ServiceAnswer[object]:
        return ServiceAnswer(error=_NOT_HERE)

    async def roll_back(self, policy: str, version: int) -> ServiceAnswer[object]:
        return ServiceAnswer(error=_NOT_HERE)


def unpack(folder: Path) -> RecordedAnswers:
    """Writes the package's recording into a folder. Raises OSError where there is no room, or no recording."""
    with as_file(files("mulligan.console") / FILE) as file, tarfile.open(file) as archive:
        for member in archive:
            if (content := archive.extractfile(member)) is not None:
                path = folder / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                with content, path.open("wb") as written:
                    shutil.copyfileobj(content, written)
    return msgspec.json.decode((folder / ANSWERS).read_bytes(), type=RecordedAnswers)
