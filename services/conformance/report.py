"""Checks, their results, and the report.

A check is an async function with a title, which states a promise of a contract. It returns if the target keeps the
promise, raises Violation if not, and NotApplicable if the target does not offer the feature.
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
    """The argument of a check."""

    async def clean_up(self) -> None:
        """Undoes what the check did. Never raises."""


S = TypeVar("S", bound=Given)
Body: TypeAlias = "Callable[[S], Awaitable[None]]"


class Verdict(StrEnum):
    PASSED = "passed"
    VIOLATED = "violated"
    NOT_APPLICABLE = "not applicable"


class Violation(Exception):
    """The target broke a promise. `demanded` is the promise, `came` what the target did instead (text, a message or a
    refusal), `sent` the request. `words` is `came` without status codes."""

    def __init__(self, demanded: str, came: object, sent: object = "", words: str = "") -> None:
        self.demanded = demanded
        self.came = shown(came)
        self.sent = shown(sent)
        self.words = words or shown(getattr(came, "message", came))
        super().__init__(f"{self.demanded}; came: {self.came}" + (f"; sent: {self.sent}" if self.sent else ""))


class NotApplicable(Exception):
    """The target does not offer the feature of the check; the message says what is missing."""


def shown(value: object) -> str:
    """The value as one short line; a message with its type."""
    if isinstance(value, Message):
        fields = text_format.MessageToString(_shortened(value), as_one_line=True, as_utf8=True)
        value = f"{type(value).__name__} {{{fields}}}" if fields else f"{type(value).__name__} {{}}"
    text = " ".join(str(value).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text)} characters)"


def _shortened(message: Message) -> Message:
    """A copy with shortened texts: an action may have megabytes."""
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
    """The result of one check. `subject` is the environment or policy that was checked; empty for the server itself.
    `hint` and `traceback` are for the author of an environment (`local.py`)."""

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
        """Whether at least one check passed and none found a violation."""
        return not self.violations and bool(self.of(Verdict.PASSED))

    def problems(self) -> str:
        """A paragraph for each violation, with a traceback if the author's code raised."""
        return "\n\n".join(_problem(result) for result in self.violations)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values: counts by verdict, and every result."""
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
        """Whether `only` is a part of the call or title, ignoring case. An empty text selects every check."""
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
    """Runs the checks that `only` selects and adds their results to the report."""
    for check in suite.checks:
        if check.wanted(only):
            result = await judge(check, given, subject)
            report.results.append(result)
            on_result(result)
