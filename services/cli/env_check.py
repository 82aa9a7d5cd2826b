"""`mulligan env check`: what is wrong with an environment, told to its author."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from services.cli.overrides import read_overrides
from services.common.extras import how_to_install
from services.conformance.report import Report, Result, Verdict

_MARKS = {Verdict.PASSED: "[green]✓[/]", Verdict.VIOLATED: "[red]✗[/]", Verdict.NOT_APPLICABLE: "[yellow]–[/]"}


def check(
    kind: Annotated[str, typer.Argument(metavar="NAME", help="A file in services/env/envs/, or a module with a dot.")],
    override: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the environment as NAME=VALUE; repeatable.")
    ] = None,
    action: Annotated[
        list[str] | None, typer.Option(help="A text that is a sensible action in it; repeatable. Finds more.")
    ] = None,
    actions: Annotated[int, typer.Option(min=0, help="How many random and hostile actions.")] = 300,
    seed: Annotated[int, typer.Option(help="Of everything random: the same seed, the same actions.")] = 0,
    step_seconds: Annotated[float, typer.Option(min=0.1, help="A step that takes longer hangs.")] = 30.0,
) -> None:
    """Play an environment in every way that a server and its clients may, and say what is wrong with it.

    Exit status: 0 all is well, 1 something is wrong, 2 the environment cannot be made.

    Example: `mulligan env check frozenlake --set size_max=4 --action Up --actions 2000`
    """
    try:
        from services.conformance.local import check_environment
    except ImportError as error:
        sys.exit(f"error: {error}: {how_to_install('env')}")
    console = Console(highlight=False, soft_wrap=True)
    settings = read_overrides(override or [])
    try:
        report = check_environment(
            kind,
            settings,
            actions=actions,
            known=tuple(action or ()),
            seed=seed,
            step_seconds=step_seconds,
            on_result=lambda result: _tell(console, result),
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    _summary(console, report)
    sys.exit(0 if report.conforms else 1)


def _tell(console: Console, result: Result) -> None:
    console.print(f"{_MARKS[result.verdict]} {escape(result.title)}")
    if result.verdict is Verdict.NOT_APPLICABLE:
        console.print(f"    [dim]{escape(result.why)}[/dim]")
    for line in filter(None, (result.words, result.hint)):
        console.print(f"    {escape(line)}")
    for line in result.traceback.splitlines():
        console.print(f"      [dim]{escape(line)}[/dim]")


def _summary(console: Console, report: Report) -> None:
    wrong = len(report.violations)
    told = f"{wrong} of {len(report.results)} checks found something wrong" if wrong else "nothing is wrong"
    console.print(f"\n{escape(report.target)}: {told}, {len(report.of(Verdict.PASSED))} passed")
