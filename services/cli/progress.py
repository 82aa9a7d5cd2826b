"""A run's events as lines and as a live display."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from datetime import timedelta
from types import TracebackType

from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from mulligan.cli.out import console, note, safe
from mulligan.trainer.client import RunInfo
from mulligan.trainer.events import Entry, EvaluationEvent, NoticeEvent, StateEvent, StepEvent
from mulligan.trainer.folder import RunState

_BAR_WIDTH = 110  # columns of a terminal that has room for a bar
_LINE_SECONDS = 5.0  # between lines where there is no terminal


async def show(run: RunInfo, entries: AsyncIterator[Entry]) -> StateEvent | None:
    """Prints events until the run ends; returns its last state. On a terminal, with a live line: step, first- and
    second-attempt success, reflections, tokens per second, time left."""
    total = run.settings.steps
    seconds: list[float] = []
    state: StateEvent | None = None
    terminal = console()
    whole_line = "{task.description}  left {task.fields[left]}  {task.fields[text]}"
    columns: list[ProgressColumn] = [
        TextColumn(whole_line, markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
    ]
    columns += [BarColumn(24), TimeElapsedColumn()] if terminal.width >= _BAR_WIDTH else []
    bar = Progress(*columns, console=terminal, transient=True)

    def show_line(text: str) -> None:
        bar.console.print(Text(safe(text)), soft_wrap=True)

    live = bar.add_task(f"step 0/{total}", total=total, text="", left="?")
    with bar:
        async for entry in entries:
            match entry.event:
                case StepEvent(step, metrics):
                    seconds.append(metrics["seconds"])
                    recent = seconds[-20:]
                    left = timedelta(seconds=round(sum(recent) / len(recent) * (total - step - 1)))
                    text = step_text(metrics)
                    done = f"step {step + 1}/{total}"
                    bar.update(live, completed=step + 1, description=done, text=text, left=left)
                    if not terminal.is_terminal or (step + 1) % 10 == 0:
                        show_line(f"step {step + 1:4}/{total}  {text}  left {left}")
                case EvaluationEvent():
                    show_line(evaluation_text(entry.event))
                case NoticeEvent(text):
                    show_line(f"note: {text}")
                case StateEvent():
                    state = entry.event
                    if state.state != RunState.RUNNING:
                        show_line(f"run {run.run_id}: {state.state} {state.error}".rstrip())
    return state


class EvaluationDisplay:
    """Tells on stderr how far an evaluation is, and its result so far: live on a terminal, else in a line every few
    seconds. A context manager."""

    def __init__(self, name: str):
        self._bar = Progress(TextColumn("{task.description}", markup=False), console=console(err=True), transient=True)
        self._live = self._bar.add_task(f"evaluating {safe(name)} …")
        self._began = self._told = time.monotonic()

    def __enter__(self) -> EvaluationDisplay:
        self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)

    def update(self, ended: int, total: int, success: float | None) -> None:
        now = time.monotonic()
        left = timedelta(seconds=round((now - self._began) / ended * (total - ended))) if ended else "?"
        so_far = "" if success is None else f"  success so far {success:.2f}"
        text = f"{ended}/{total} attempts{so_far}  left {left}"
        self._bar.update(self._live, description=text)
        if not self._bar.console.is_terminal and now - self._told > _LINE_SECONDS:
            self._told = now
            note(text)


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
    return f"test success after {event.step} steps: {event.success:.3f}  ({event.attempts} first attempts{excluded})"
