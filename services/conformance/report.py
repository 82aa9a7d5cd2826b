"""Checks, what they find, and how that is told.

A check is an async function with a title in words. It returns when the promise is kept, raises Violation when it is
not, and NotApplicable when the target does not offer what the promise is about.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from google.protobuf import text_format
from google.protobuf.message import Message

SHOWN = 300  # characters of a message in a report


class Given(Protocol):
    """What a check is given."""

    async def clean_up(self) -> None:
        """Undoes what the check did. Raises nothing."""


S = TypeVar("S", bound=Given)
Body: TypeAlias = "Callable[[S], Awaitable[None]]"


class Verdict(StrEnum):
    PASSED = "passed"
    VIOLATED = "violated"
    NOT_APPLICABLE = "not applicable"


class Violation(Exception):
    """The target broke a promise. `came` is what it did instead, in words, a message or a refusal; `words` is the same
    without status codes."""

    def __init__(self, demanded: str, came: object, sent: object = "", words: str = "") -> None:
        self.demanded = demanded
        self.came = shown(came)
        self.sent = shown(sent)
        self.words = words or shown(getattr(came, "message", came))
        super().__init__(f"{self.demanded}; came: {self.came}" + (f"; sent: {self.sent}" if self.sent else ""))


class NotApplicable(Exception):
    """The target does not offer what the check is about; the message says what is missing."""


def shown(value: object) -> str:
    """One line for people: a message with its type, shortened."""
    if isinstance(value, Message):
        fields = text_format.MessageToString(_shortened(value), as_one_line=True, as_utf8=True)
        value = f"{type(value).__name__} {{{fields}}}" if fields else f"{type(value).__name__} {{}}"
    text = " ".join(str(value).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text)} characters)"


def _shortened(message: Message) -> Message:
    """A copy whose texts are short: an action may have megabytes."""
    copy = type(message)()
    copy.CopyFrom(message)
    for descriptor, value in copy.ListFields():
        if isinstance(value, str) and len(value) > SHOWN:
            setattr(copy, descriptor.name, f"{value[: SHOWN // 3]}… ({len(value)} characters)")
    return copy


def demand(condition: bool, demanded: str, came: object, sent: object = "") -> None:
    """Raises Violation unless the condition holds."""
    if not condition:
        raise Violation(demanded, came, sent)


@dataclass(frozen=True, slots=True)
class Result:
    """`subject` is the environment or policy that was looked at; empty for the server itself. `hint` and `traceback`
    are for the author of an environment (`local.py`)."""

    call: str
    title: str
    subject: str
    verdict: Verdict
    seconds: float
    sent: str = ""
    demanded: str = ""
    came: str = ""
    why: str = ""
    words: str = ""
    hint: str = ""
    traceback: str = ""


def _problem(result: Result) -> str:
    lines = [f"✗ {result.title}", f"  {result.words}", result.hint and f"  {result.hint}"]
    lines += [f"    {line}" for line in result.traceback.splitlines()]
    return "\n".join(filter(None, lines))


@dataclass(slots=True)
class Report:
    service: str
    target: str
    results: list[Result] = field(default_factory=list)

    def of(self, verdict: Verdict) -> list[Result]:
        return [result for result in self.results if result.verdict is verdict]

    @property
    def violations(self) -> list[Result]:
        return self.of(Verdict.VIOLATED)

    @property
    def conforms(self) -> bool:
        """Whether something was checked and nothing was violated."""
        return not self.violations and bool(self.of(Verdict.PASSED))

    def problems(self) -> str:
        """What is wrong, in words: a paragraph per violation, with a traceback where the author's code raised."""
        return "\n\n".join(_problem(result) for result in self.violations)

    def as_dict(self) -> dict[str, Any]:
        """For machines: counts by verdict and every result."""
        return {
            "service": self.service,
            "target": self.target,
            "conforms": self.conforms,
            "counts": {verdict.value: len(self.of(verdict)) for verdict in Verdict},
            "results": [asdict(result) for result in self.results],
        }


@dataclass(frozen=True, slots=True)
class Check(Generic[S]):
    call: str  # the call of the contract that it is about
    title: str
    body: Body[S]

    def wanted(self, only: str) -> bool:
        """Whether `--only` means it: a part of its call or title, in any case. All are meant by an empty one."""
        return only.lower() in f"{self.call} {self.title}".lower()


class Suite(Generic[S]):
    """An ordered list of checks."""

    def __init__(self) -> None:
        self.checks: list[Check[S]] = []

    def check(
        self, call: str, title: str
    ) -> Callable[[Callable[[S], Awaitable[None]]], Callable[[S], Awaitable[None]]]:
        """`@suite.check("StepEpisode", "a repeated step returns the stored answer")`"""

        def add(body: Body[S]) -> Body[S]:
            self.checks.append(Check(call, title, body))
            return body

        return add

    def extend(self, others: Iterable[Suite[S]]) -> None:
        for other in others:
            self.checks += other.checks


async def judge(check: Check[S], given: S, subject: str = "") -> Result:
    """Runs one check, then undoes what it did."""
    began = time.monotonic()

    def result(verdict: Verdict, **found: str) -> Result:
        return Result(check.call, check.title, subject, verdict, round(time.monotonic() - began, 3), **found)

    try:
        await check.body(given)
        return result(Verdict.PASSED)
    except Violation as error:
        return result(Verdict.VIOLATED, sent=error.sent, demanded=error.demanded, came=error.came, words=error.words)
    except NotApplicable as error:
        return result(Verdict.NOT_APPLICABLE, why=str(error))
    finally:
        await given.clean_up()


async def run_suite(
    report: Report,
    suite: Suite[S],
    given: S,
    *,
    subject: str = "",
    only: str = "",
    on_result: Callable[[Result], None] = lambda result: None,
) -> None:
    """Adds a result for each check that is wanted."""
    for check in suite.checks:
        if check.wanted(only):
            result = await judge(check, given, subject)
            report.results.append(result)
            on_result(result)
