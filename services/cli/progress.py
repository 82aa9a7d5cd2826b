"""A run's events as lines and as a live display."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import nullcontext
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from mulligan.cli.out import EVERY_SECONDS, FIRST_SECONDS, Heartbeat, console, safe
from mulligan.trainer.client import RunInfo
from mulligan.trainer.events import Entry, EvaluationEvent, NoticeEvent, StateEvent, StepEvent
from mulligan.trainer.folder import RunState

_BAR_WIDTH = 110  # columns of a terminal that has room for a bar
_LINE_SECONDS = 5.0  # between lines about a command's progress where there is no terminal


class _Position:
    """How far a run is, by the events seen so far."""

    def __init__(self, run: RunInfo):
        self.total = run.settings.steps
        self._seconds: list[float] = []
        self._step = 0
        self._evaluated = False

    def step(self, step: int, seconds: float) -> timedelta:
        """The time that is left after this step."""
        self._step = step + 1
        self._seconds.append(seconds)
        recent = self._seconds[-20:]
        return timedelta(seconds=round(sum(recent) / len(recent) * (self.total - self._step)))

    def evaluated(self) -> None:
        self._evaluated = True

    def __str__(self) -> str:
        """What the run does now."""
        if self._step == 0 and not self._evaluated:
            return "creating the learner, then evaluating the policy before training"
        if self._step == self.total:
            return "evaluating the policy after training"
        return f"working on step {self._step + 1}/{self.total}"


async def show(
    run: RunInfo, entries: AsyncIterator[Entry], *, first: float = FIRST_SECONDS, every: float = EVERY_SECONDS
) -> StateEvent | None:
    """Prints events until the run ends; returns its last state.

    On a terminal, with a live line: step, first- and second-attempt success, reflections, tokens per second, time left.
    Elsewhere a line on stderr says what the run does when nothing happened for `first` and then `every` seconds.
    """
    position = _Position(run)
    total = position.total
    state: StateEvent | None = None
    terminal = console()
    whole_line = "{task.description}  left {task.fields[left]}  {task.fields[text]}"
    columns: list[ProgressColumn] = [
        TextColumn(whole_line, markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
    ]
    columns += [BarColumn(24)] if terminal.width >= _BAR_WIDTH else []
    columns.append(TimeElapsedColumn())
    bar = Progress(*columns, console=terminal, transient=True)
    heartbeat = Heartbeat(lambda: f"run {run.run_id}: {position}", first=first, every=every)

    def show_line(text: str) -> None:
        bar.console.print(Text(safe(text)), soft_wrap=True)
        heartbeat.said()

    live = bar.add_task(f"step 0/{total}", total=total, text=str(position), left="?")
    with nullcontext() if terminal.is_terminal else heartbeat, bar:
        async for entry in entries:
            match entry.event:
                case StepEvent(step, metrics):
                    left = position.step(step, metrics["seconds"])
                    text = step_text(metrics)
                    done = f"step {step + 1}/{total}"
                    bar.update(live, completed=step + 1, description=done, text=text, left=left)
                    if not terminal.is_terminal or (step + 1) % 10 == 0:
                        show_line(f"step {step + 1:4}/{total}  {text}  left {left}")
                case EvaluationEvent():
                    position.evaluated()
                    bar.update(live, text=str(position))
                    show_line(evaluation_text(entry.event))
                case NoticeEvent(text):
                    show_line(f"note: {text}")
                case StateEvent():
                    state = entry.event
                    if state.state != RunState.RUNNING:
                        show_line(f"run {run.run_id}: {state.state} {state.error}".rstrip())
    return state


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
        left = time_left(self._began, ended, total)
        self.say(f"{protocol and f'{protocol}: '}{ended}/{total} attempts{so_far}  left {left}")


def time_left(began: float, done: float, total: float) -> str:
    """What is left of a task that began at `began` on the monotonic clock, if the rest is as slow as what is done; "?"
    before anything is done."""
    return str(timedelta(seconds=round((time.monotonic() - began) / done * (total - done)))) if done else "?"


def step_text(metrics: dict[str, float]) -> str:
    second = metrics.get("success_second")
    tokens = metrics["sampled_tokens"] / max(metrics["sample_seconds"], 1e-9)
    excluded = f"  excluded {metrics['excluded']:.0f}" if metrics["excluded"] else ""
    return (
        f"first {metrics.get('success_first', 0):.2f}  second {'  – ' if second is None else f'{second:.2f}'}  "
        f"reflections {metrics['reflections']:.0f}  {tokens:,.0f} tokens/s{excluded}"
    )


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
