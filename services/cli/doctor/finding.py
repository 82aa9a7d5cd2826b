"""What a check found, and how checks run: at the same time, each with a limit of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

T = TypeVar("T")


class Diagnosis(StrEnum):
    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """`said` is what is wrong, what was seen, or why the check was skipped. `remedy` is what to do."""

    check: str
    subject: str
    verdict: Diagnosis
    said: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Topic:
    """Makes the findings of one check, about one subject."""

    check: str
    subject: str

    def ok(self, said: str) -> Finding:
        return Finding(self.check, self.subject, Diagnosis.OK, said)

    def warning(self, said: str, remedy: str) -> Finding:
        return Finding(self.check, self.subject, Diagnosis.WARNING, said, remedy)

    def problem(self, said: str, remedy: str) -> Finding:
        return Finding(self.check, self.subject, Diagnosis.PROBLEM, said, remedy)

    def skipped(self, why: str) -> Finding:
        return Finding(self.check, self.subject, Diagnosis.SKIPPED, why)


@dataclass(frozen=True, slots=True)
class Examination:
    """A check that was not run yet. `remedy` is what to do if it takes longer than `seconds`."""

    topic: Topic
    work: Callable[[], Awaitable[Sequence[Finding]]]
    seconds: float
    remedy: str = "Run the command again when the machine does less, and look whether a network file system hangs."


def blocking(topic: Topic, work: Callable[[], Sequence[Finding]], seconds: float) -> Examination:
    """A check that blocks: a look at disks, for example."""
    return Examination(topic, lambda: in_thread(work), seconds)


async def in_thread(work: Callable[[], T]) -> T:
    """As `asyncio.to_thread`, but nothing waits for a call that hangs, as on a network file system that is away."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(method: str, value: Any) -> None:
        if not future.done():
            getattr(future, method)(value)

    def tell(method: str, value: Any) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, method, value)

    def run() -> None:
        try:
            found = work()
        except Exception as error:  # noqa: BLE001 - raised where the result is awaited
            tell("set_exception", error)
        else:
            tell("set_result", found)

    threading.Thread(target=run, daemon=True).start()
    return await future


async def examine(examinations: Sequence[Examination]) -> list[Finding]:
    """Runs all at the same time. The findings come in the order of the examinations. A check that fails or takes too
    long is a finding, too."""
    found = await asyncio.gather(*map(_one, examinations))
    return [finding for findings in found for finding in findings]


async def _one(examination: Examination) -> Sequence[Finding]:
    topic = examination.topic
    try:
        async with asyncio.timeout(examination.seconds):
            return await examination.work()
    except TimeoutError:
        return [topic.warning(f"The check did not end within {examination.seconds:g} s.", examination.remedy)]
    except Exception as error:  # noqa: BLE001 - the other checks still say what they found
        said = f"The check itself failed: {type(error).__name__}: {error}"
        return [topic.warning(said, "Report this with the line above; the other checks are not concerned.")]
