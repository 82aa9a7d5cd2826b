"""`mulligan env check`: checks an environment, for its author."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mulligan.cli.conformance import MARKS
from mulligan.cli.out import Heartbeat, fail, line
from mulligan.cli.overrides import read_overrides
from mulligan.common.extras import how_to_install
from mulligan.conformance.report import Report, Result, Verdict


def check(
    kind: Annotated[str, typer.Argument(metavar="NAME", help="A file in services/env/envs/, or a module with a dot.")],
    override: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the environment as NAME=VALUE; repeatable.")
    ] = None,
    action: Annotated[
        list[str] | None, typer.Option(help="A valid action of the environment; repeatable. With it, more is checked.")
    ] = None,
    actions: Annotated[int, typer.Option(min=0, help="How many random and hostile actions.")] = 300,
    seed: Annotated[int, typer.Option(help="Seed of all random choices: the same seed gives the same actions.")] = 0,
    step_seconds: Annotated[float, typer.Option(min=0.1, help="A step that takes longer hangs.")] = 30.0,
) -> None:
    """Check an environment: play it as a server and its clients may, and explain what is wrong.

    Exit status: 0 all is well, 1 something is wrong, 2 the environment cannot be made.

    Example: `mulligan env check frozenlake --set size_max=4 --action Up --actions 2000`
    """
    try:
        from mulligan.conformance.local import check_environment
    except ImportError as error:
        fail(f"{error}: {how_to_install('env')}", 2)
    settings = read_overrides(override or [])

    def tell(result: Result) -> None:
        _print_result(result)
        heartbeat.said()

    try:
        with Heartbeat(lambda: f"checking {kind}") as heartbeat:
            report = check_environment(
                kind,
                settings,
                actions=actions,
                known=tuple(action or ()),
                seed=seed,
                step_seconds=step_seconds,
                on_result=tell,
            )
    except ValueError as error:
        fail(error, 2)
    _summary(report)
    sys.exit(0 if report.conforms else 1)


def _print_result(result: Result) -> None:
    line(MARKS[result.verdict], " ", result.title)
    if result.verdict is Verdict.NOT_APPLICABLE:
        line("    ", (result.why, "dim"))
    for said in filter(None, (result.words, result.hint)):
        line("    ", said)
    for said in result.traceback.splitlines():
        line("      ", (said, "dim"))


def _summary(report: Report) -> None:
    wrong = len(report.violations)
    told = f"{wrong} of {len(report.results)} checks found something wrong" if wrong else "nothing is wrong"
    line(f"\n{report.target}: {told}, {len(report.of(Verdict.PASSED))} passed")
