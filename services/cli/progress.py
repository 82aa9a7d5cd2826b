"""A run's events as lines and as a live display."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from services.trainer.client import RunInfo
from services.trainer.events import Entry, EvaluationEvent, NoticeEvent, StateEvent, StepEvent
from services.trainer.folder import RunState


async def show(run: RunInfo, entries: AsyncIterator[Entry], console: Console) -> StateEvent | None:
    """Prints events until the run ends; returns its last state. On a terminal, with a live line: step, first- and
    second-attempt success, reflections, tokens per second, time left."""
    total = run.settings.steps
    seconds: list[float] = []
    state: StateEvent | None = None
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(24),
        TextColumn("{task.fields[text]}"),
        console=console,
        transient=True,
    )
    live = bar.add_task(f"step 0/{total}", total=total, text="")
    with bar:
        async for entry in entries:
            match entry.event:
                case StepEvent(step, metrics):
                    seconds.append(metrics["seconds"])
                    recent = seconds[-20:]
                    left = timedelta(seconds=round(sum(recent) / len(recent) * (total - step - 1)))
                    text = f"{step_text(metrics)}  left {left}"
                    bar.update(live, completed=step + 1, description=f"step {step + 1}/{total}", text=text)
                    if not console.is_terminal or (step + 1) % 10 == 0:
                        console.print(f"step {step + 1:4}/{total}  {text}", highlight=False, soft_wrap=True)
                case EvaluationEvent():
                    console.print(evaluation_text(entry.event), highlight=False, soft_wrap=True)
                case NoticeEvent(text):
                    console.print(f"note: {text}", highlight=False, soft_wrap=True)
                case StateEvent():
                    state = entry.event
                    if state.state != RunState.RUNNING:
                        console.print(
                            f"run {run.run_id}: {state.state} {state.error}".rstrip(), highlight=False, soft_wrap=True
                        )
    return state


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
