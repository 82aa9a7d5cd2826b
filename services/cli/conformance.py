"""`mulligan conformance`: checks an implementation of a service, in any language, against its contract."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mulligan.cli.connection import DEFAULT_ADDRESSES, client_tls, insecure, reader_token, service_token
from mulligan.cli.out import Heartbeat, fail, json_safe, line, show
from mulligan.common.channel import UnprotectedToken
from mulligan.common.tls import ClientTls
from mulligan.conformance.report import Report, Result, Verdict
from mulligan.conformance.target import Target, TargetUnreachable

conformance = typer.Typer(
    help="Check an implementation of a service, in any language: `env`, `policy`, `memory`, `trainer`.\n\n"
    "A server with tokens is checked with an administrator's in MULLIGAN_CLI_TOKEN and, for the check of roles, a "
    "reader's in MULLIGAN_CLI_READER_TOKEN. Those of your own `mulligan up` are found without the variables.\n\n"
    "Exit status: 0 it conforms, 1 it violates something, 2 it cannot be checked (unreachable, or no such service).",
    no_args_is_help=True,
)
MARKS = {Verdict.PASSED: ("✓", "green"), Verdict.VIOLATED: ("✗", "red"), Verdict.NOT_APPLICABLE: ("–", "yellow")}
Only = Annotated[str, typer.Option(help="Only the checks whose call or title contains this, e.g. ForkEpisode.")]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds that any call may take.")]
Seed = Annotated[int, typer.Option(help="Seed of all random choices: the same seed gives the same actions.")]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON, for machines, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only violations and the summary.")]
Writes = Annotated[bool, typer.Option("--writes", help="Also run checks that change what is served while they run.")]
OnResult = Callable[[Result], None]
TlsCa = Annotated[Path | None, typer.Option(help="Use TLS, with this CA.", exists=True, dir_okay=False)]


def _target(service: str) -> Any:
    return typer.Option("--target", "-t", help="HOST:PORT of the server.", show_default=DEFAULT_ADDRESSES[service])


@conformance.command()
def env(
    target: Annotated[str, _target("env")] = DEFAULT_ADDRESSES["env"],
    environment: Annotated[str, typer.Option(help="Only this one; all that are listed when left out.")] = "",
    action: Annotated[
        list[str] | None,
        typer.Option(help="A valid action of the environment; repeatable. With it, more is checked."),
    ] = None,
    actions: Annotated[int, typer.Option(min=0, help="How many random and hostile actions, per environment.")] = 300,
    only: Only = "",
    timeout: Timeout = 30.0,
    seed: Seed = 0,
    tls_ca: TlsCa = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check an environment service. Plays episodes, and ends all that it starts.

    Example: `mulligan conformance env --target 127.0.0.1:50051 --environment frozenlake --action '```Up```'`
    """
    from mulligan.conformance.env.game import EnvOptions
    from mulligan.conformance.env.run import check
    from mulligan.conformance.env.run import target as connect

    options = EnvOptions(actions, seed, tuple(action or ()))

    async def main(on_result: OnResult) -> Report:
        async with closing(connect(target, **_options(target, timeout, tls_ca))) as opened:
            return await check(opened, options, only=only, environment=environment, on_result=on_result)

    _run(main, as_json=as_json, quiet=quiet)


@conformance.command()
def memory(
    target: Annotated[str, _target("memory")] = DEFAULT_ADDRESSES["memory"],
    only: Only = "",
    timeout: Timeout = 30.0,
    tls_ca: TlsCa = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check a memory service. Writes to new scopes with random names, and deletes what it wrote.

    Example: `mulligan conformance memory --target 127.0.0.1:50053`
    """
    from mulligan.conformance.memory.run import check
    from mulligan.conformance.memory.run import target as connect

    async def main(on_result: OnResult) -> Report:
        async with closing(connect(target, **_options(target, timeout, tls_ca))) as opened:
            return await check(opened, only=only, on_result=on_result)

    _run(main, as_json=as_json, quiet=quiet)


@conformance.command()
def policy(
    target: Annotated[str, _target("policy")] = DEFAULT_ADDRESSES["policy"],
    name: Annotated[str, typer.Option("--policy", help="Only this one; all that are listed when left out.")] = "",
    writes: Writes = False,
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Largest difference allowed between log-probabilities of one token.")
    ] = 0.1,
    only: Only = "",
    timeout: Timeout = 60.0,
    tls_ca: TlsCa = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check a policy service. Samples a few hundred tokens of each policy.

    Example: `mulligan conformance policy --target 127.0.0.1:50052 --policy actor`
    """
    from mulligan.conformance.policy.run import check
    from mulligan.conformance.policy.run import target as connect
    from mulligan.conformance.policy.served import PolicyOptions

    options = PolicyOptions(tolerance, writes)

    async def main(on_result: OnResult) -> Report:
        connection = connect(target, **_options(target, timeout, tls_ca))
        async with closing(connection) as opened:
            return await check(opened, options, only=only, policy=name, on_result=on_result)

    _run(main, as_json=as_json, quiet=quiet)


@conformance.command()
def trainer(
    target: Annotated[str, _target("trainer")] = DEFAULT_ADDRESSES["trainer"],
    model: Annotated[str, typer.Option(help="The model that learners and runs train.")] = "embedded",
    writes: Annotated[
        bool,
        typer.Option("--writes", help="Also run checks that leave checkpoints, published weights and runs behind."),
    ] = False,
    environment: Annotated[str, typer.Option(help="Environment of the runs that --writes starts.")] = "frozenlake-3x3",
    recipe: Annotated[
        Path | None, typer.Option(help="Settings of these runs; a very small run when left out.", exists=True)
    ] = None,
    run_seconds: Annotated[float, typer.Option(min=1.0, help="Seconds that such a run may take.")] = 600.0,
    only: Only = "",
    timeout: Timeout = 120.0,
    tls_ca: TlsCa = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check a trainer. Creates learners and deletes them; starts runs only with --writes.

    Example: `mulligan conformance trainer --target 127.0.0.1:50054 --writes`
    """
    from mulligan.cli.train import read_settings
    from mulligan.conformance.trainer.held import TrainerOptions
    from mulligan.conformance.trainer.run import check, smallest
    from mulligan.conformance.trainer.run import target as connect
    from mulligan.trainer.wire import settings_to_proto

    config = settings_to_proto(read_settings(recipe, [])) if recipe else smallest(environment, model)
    options = TrainerOptions(model, writes, config, run_seconds)

    async def main(on_result: OnResult) -> Report:
        async with closing(connect(target, **_options(target, timeout, tls_ca))) as opened:
            return await check(opened, options, only=only, on_result=on_result)

    _run(main, as_json=as_json, quiet=quiet)


@asynccontextmanager
async def closing(target: Target) -> AsyncIterator[Target]:
    try:
        yield target
    finally:
        await target.close()


def _options(address: str, timeout: float, tls_ca: Path | None) -> dict[str, Any]:
    """Of a target. `tls_ca` wins over the variable."""
    tls = client_tls()
    if tls_ca is not None:
        tls = replace(tls or ClientTls(), ca=tls_ca)
    return {
        "token": service_token(address),
        "reader_token": reader_token(address),
        "timeout": timeout,
        "tls": tls,
        "insecure": insecure(),
    }


def _run(main: Callable[[OnResult], Coroutine[Any, Any, Report]], *, as_json: bool, quiet: bool) -> None:
    group = ["", ""]

    def tell(result: Result) -> None:
        if not as_json and not (quiet and result.verdict is not Verdict.VIOLATED):
            print_result(result, group)
            heartbeat.said()

    try:
        with Heartbeat(lambda: "checking") as heartbeat:
            report = asyncio.run(main(tell))
    except (TargetUnreachable, UnprotectedToken) as error:
        fail(error, 2)
    except KeyboardInterrupt:
        sys.exit(130)
    if as_json:
        show(json_safe(json.dumps(report.as_dict(), indent=2, ensure_ascii=False)))
    else:
        print_summary(report)
    sys.exit(0 if report.conforms else 1)


def print_result(result: Result, group: list[str]) -> None:
    """Prints a line; for a violation also what was sent, what the contract demands, and what came back. `group` holds
    the subject and call of the previous line."""
    if group[0] != result.subject:
        line("\n", (result.subject, "bold"))
    if group != [result.subject, result.call]:
        line("  ", (result.call, "dim"))
    group[:] = [result.subject, result.call]
    line("    ", MARKS[result.verdict], " ", result.title, (f" ({result.why})" if result.why else "", "dim"))
    if result.verdict is Verdict.VIOLATED:
        if result.sent:
            line("      sent:     ", result.sent)
        line("      contract: ", result.demanded)
        line("      came:     ", result.came)


def print_summary(report: Report) -> None:
    counts = ", ".join(f"{len(report.of(verdict))} {verdict}" for verdict in Verdict)
    line(f"\n{report.service} at {report.target}: {counts}")
    for result in report.violations:
        of = f"{result.subject}: " if result.subject else ""
        line("  ", MARKS[Verdict.VIOLATED], f" {of}{result.call}: {result.title}")
    if not report.results:
        line("  no check has the text of --only in its title or call")
