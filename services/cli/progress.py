"""A run's events as lines and as a live display."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from mulligan.cli.out import EVERY_SECONDS, FIRST_SECONDS, Heartbeat, console
from mulligan.common.errors import CallFailed, DomainError, ServiceUnavailable
from mulligan.common.tasks import cancel
from mulligan.common.text import safe
from mulligan.trainer.activity import Activity
from mulligan.trainer.client import RunInfo
from mulligan.trainer.events import Entry, EvaluationEvent, NoticeEvent, StateEvent, StepEvent
from mulligan.trainer.folder import RunState

_BAR_WIDTH = 110  # columns of a terminal that has room for a bar
SUCCESS = "success_"  # begins the name of the metric of each role of episodes
_LINE_SECONDS = 5.0  # between lines about a command's progress where there is no terminal


class _RunDisplay:
    """How far a run is, by the events and activities seen so far. A context manager: within it, the display is live on
    a terminal; elsewhere lines on stderr say what the run does."""

    def __init__(self, run: RunInfo, first: float, every: float):
        self._total = run.settings.steps
        self._trains = run.settings.trains
        self._seconds: list[float] = []
        self._metrics: set[str] = set()  # names so far: a step may have no second attempts
        self._step = 0
        self._evaluated = False
        self._run = run
        terminal = console()
        self._is_terminal = terminal.is_terminal
        columns: list[ProgressColumn] = [
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
        ]
        columns += [BarColumn(24)] if terminal.width >= _BAR_WIDTH else []
        columns.append(TimeElapsedColumn())
        self._bar = Progress(*columns, console=terminal, transient=True)
        self._steps = self._bar.add_task(f"step 0/{self._total}", total=self._total)
        self._now = self._bar.add_task(self._what(), total=None)
        self._heartbeat = Heartbeat(lambda: f"run {run.run_id}: {self._line()}", first=first, every=every)
        self._shown = ExitStack()

    def __enter__(self) -> Self:
        if not self._is_terminal:
            self._shown.enter_context(self._heartbeat)
        self._shown.enter_context(self._bar)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shown.__exit__(kind, error, trace)

    def line(self, text: str) -> None:
        """Prints a line that stays."""
        self._bar.console.print(Text(safe(text)), soft_wrap=True)
        self._heartbeat.said()

    def step(self, step: int, metrics: dict[str, float]) -> None:
        self._step = step + 1
        self._seconds.append(metrics["seconds"])
        left = self._left()
        self._metrics.update(metrics)
        told = step_text(metrics, roles_in(self._metrics))
        # The time left comes first in the live line, which is cut at the terminal's width.
        live = f"step {self._step}/{self._total}  left {left}  {told}"
        self._bar.update(self._steps, completed=self._step, description=live)
        if not self._is_terminal or self._step % 10 == 0:
            self.line(f"step {self._step:4}/{self._total}  {told}  left {left}")

    def evaluated(self, event: EvaluationEvent) -> None:
        self._evaluated = True
        self.line(evaluation_text(event))

    def does(self, run: RunInfo) -> None:
        """What the run does now, or waits for."""
        self._run = run
        activity = run.activity
        self._bar.update(
            self._now, description=safe(self._what()), completed=activity.done, total=activity.total or None
        )

    def _left(self) -> timedelta:
        """Of the steps, as if each took the mean of the last twenty."""
        recent = self._seconds[-20:]
        return timedelta(seconds=round(sum(recent) / len(recent) * (self._total - self._step)))

    def _line(self) -> str:
        """How many steps are done, and what the run does now."""
        if not activity_text(self._run) and not self._run.paused:
            return self._what()
        left = f", left {self._left()}" if self._seconds and self._step < self._total else ""
        return f"{self._step}/{self._total} steps done{left}; {self._what()}"

    def _what(self) -> str:
        """What the run does now, how much of it is done, and how long the rest may take."""
        if self._run.paused:
            return f"paused: {self._run.paused}"
        if does := activity_text(self._run):
            return f"now {does}"
        if self._step == 0 and not self._evaluated:
            first = "creating the learner, then evaluating" if self._trains else "evaluating"
            return f"{first} the policy before training"
        if self._step == self._total:
            return "evaluating the policy after training"
        return f"working on step {self._step + 1}/{self._total}"


async def show(
    run: RunInfo,
    entries: AsyncIterator[Entry],
    ask: Callable[[], Awaitable[RunInfo]],
    *,
    first: float = FIRST_SECONDS,
    every: float = EVERY_SECONDS,
) -> StateEvent | None:
    """Prints events until the run ends; returns its last state. `ask` gets the run as it is now.

    On a terminal, with live lines: step, success of each role, reflections, tokens per second, time left,
    and what the run does now. Elsewhere a line on stderr says the latter when nothing happened for `first` and then
    `every` seconds.
    """
    state: StateEvent | None = None
    with _RunDisplay(run, first, every) as display:
        asking = asyncio.create_task(_follow(display, ask, min(first, every)))
        try:
            async for entry in entries:
                match entry.event:
                    case StepEvent(step, metrics):
                        display.step(step, metrics)
                    case EvaluationEvent():
                        display.evaluated(entry.event)
                    case NoticeEvent(text):
                        display.line(f"note: {text}")
                    case StateEvent():
                        state = entry.event
                        if state.state != RunState.RUNNING:
                            display.line(f"run {run.run_id}: {state.state} {state.error}".rstrip())
        finally:
            await cancel(asking)
    return state


async def _follow(display: _RunDisplay, ask: Callable[[], Awaitable[RunInfo]], every: float) -> None:
    """Asks what the run does, again and again. A trainer that does not answer is the events' matter."""
    while True:
        with suppress(DomainError, CallFailed, ServiceUnavailable):
            display.does(await ask())
        await asyncio.sleep(every)


class LiveLine:
    """One line on stderr that says what is done now: live on a terminal, else printed every few seconds. A context
    manager."""

    def __init__(self, text: str, *, first: float = FIRST_SECONDS, every: float = _LINE_SECONDS):
        self._text = text
        output = console(err=True)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False), TimeElapsedColumn(), console=output, transient=True
        )
        self._live = self._bar.add_task(f"{safe(text)} …")
        self._shown: Progress | Heartbeat = (
            self._bar if output.is_terminal else Heartbeat(lambda: self._text, first=first, every=every)
        )

    def __enter__(self) -> Self:
        self._shown.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shown.__exit__(kind, error, trace)

    def say(self, text: str) -> None:
        """From now on the line is this."""
        self._text = text
        self._bar.update(self._live, description=safe(text))


class EvaluationDisplay(LiveLine):
    """Shows the progress of an evaluation and its result so far."""

    def __init__(self, name: str, *, first: float = FIRST_SECONDS, every: float = _LINE_SECONDS):
        super().__init__(f"evaluating {name}", first=first, every=every)
        self._began = time.monotonic()
        self._protocol = ""

    def update(self, ended: int, total: int, success: float | None, protocol: str = "") -> None:
        """`protocol` is the label of the protocol that plays now; time is counted from its first call."""
        if protocol != self._protocol:
            self._protocol = protocol
            self._began = time.monotonic()
        so_far = "" if success is None else f"  success so far {success:.2f}"
        left = time_left(time.monotonic() - self._began, ended, total)
        self.say(f"{protocol and f'{protocol}: '}{ended}/{total} attempts{so_far}  left {left}")


def activity_text(run: RunInfo) -> str:
    """What a run does, how much of it is done, and how long the rest may take; "" if it does nothing."""
    return "; beside it ".join(filter(None, map(_activity_text, (run.activity, run.beside))))


def _activity_text(now: Activity) -> str:
    if not now.doing or not now.total:
        return now.doing
    return f"{now.doing} {now.done:,}/{now.total:,}, left {time_left(now.seconds, now.done, now.total)}"


def time_left(seconds: float, done: int, total: int) -> str:
    """What is left if `done` of `total` parts took `seconds` and the rest is as slow; "?" before anything is done."""
    return str(timedelta(seconds=round(seconds / done * (total - done)))) if done else "?"


def step_text(metrics: Mapping[str, float], roles: Sequence[str]) -> str:
    """One line about a step: the success of each of the `roles`, what was written, how fast."""
    tokens = metrics["sampled_tokens"] / max(metrics["sample_seconds"], 1e-9)
    excluded = f"  excluded {metrics['excluded']:.0f}" if metrics["excluded"] else ""
    shown = [f"{role} {_share(metrics.get(f'{SUCCESS}{role}'))}" for role in roles]
    texts = metrics["reflections"]  # of any role
    others = "texts" in metrics and metrics.get("texts_reflection", 0.0) != texts
    word = "texts" if others else "reflections"
    shown.append(f"{word} {texts:.0f}")
    return "  ".join([*shown, f"{tokens:,.0f} tokens/s{excluded}"])


def _share(value: float | None) -> str:
    return "  – " if value is None else f"{value:.2f}"


def roles_in(metrics: Iterable[str]) -> list[str]:
    """The roles of the episodes that these metrics are of, in the run's own environment; "first" comes first."""
    found = (name.removeprefix(SUCCESS) for name in metrics if name.startswith(SUCCESS))
    return sorted(found, key=lambda role: (role != "first", role))


def evaluation_text(event: EvaluationEvent) -> str:
    excluded = f", {event.excluded} excluded" if event.excluded else ""
    place = f" in {event.environment}" if event.environment else ""
    measured = f"({event.attempts} first attempts{excluded})"
    text = f"test success{place} after {event.step} steps: {event.success:.3f}  {measured}"
    for label, metrics in by_protocol(event.metrics).items():
        text += f"\n  {label}: " + "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
    return text


def by_protocol(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The metrics of an evaluation's protocols: of each label, in the order of their names and numbers."""

    def order(name: str) -> list[str | int]:
        return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name)]

    found: dict[str, dict[str, float]] = {}
    for name, value in sorted(metrics.items(), key=lambda item: order(item[0])):
        label, _, metric = name.partition("/")
        found.setdefault(label, {})[metric] = value
    return found
