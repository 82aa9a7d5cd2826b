"""`mulligan demo`: the whole loop on this machine, from four processes to a chart."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mulligan.cli.connection import command
from mulligan.cli.experiences import lines
from mulligan.cli.local import LocalServices, ServiceFailed
from mulligan.cli.out import fail
from mulligan.cli.out import show as say
from mulligan.cli.progress import show
from mulligan.cli.report import draw_chart, next_steps, recorded_rlvr, result_lines
from mulligan.cli.stop import AcceptEnvironment
from mulligan.cli.train import read_settings
from mulligan.common.errors import CallFailed, DomainError, ServiceUnavailable
from mulligan.common.tasks import cancel
from mulligan.trainer.client import RunClient, RunInfo
from mulligan.trainer.folder import RunState
from mulligan.trainer.settings import RunSettings

DEFAULT_RECIPE = Path("frozenlake-3x3")


def demo(
    folder: Annotated[Path, typer.Option(help="Gets everything that the demo writes.")] = Path("runs/demo"),
    recipe: Annotated[Path, typer.Option(help="The run's settings: a TOML file, or a recipe's name.")] = DEFAULT_RECIPE,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="A setting as NAME=VALUE, over the recipe's; repeatable.")
    ] = None,
    experiences: Annotated[int, typer.Option(help="How many experiences are shown at the end.", min=0)] = 1,
    accept_environment: AcceptEnvironment = False,
) -> None:
    """Train the embedded model on FrozenLake by ERL: four services, one run, a chart. About five minutes on two cores.

    Another recipe may train another model, which the policy service then serves.

    An interrupted demo goes on where it was.

    Example: `mulligan demo --folder runs/rlvr --recipe frozenlake-3x3-rlvr`
    """
    settings = read_settings(recipe, override or [])
    try:
        finished = asyncio.run(_demo(folder, settings, experiences, accept_environment))
    except (ServiceFailed, DomainError, CallFailed, ServiceUnavailable) as error:
        fail(error)
    if not finished:
        given = ["--folder", str(folder), "--recipe", str(recipe)]
        given += [word for one in override or () for word in ("--set", one)]
        given += ["--experiences", str(experiences)]
        say(f"stopped. This goes on where it was: {command('demo', *given)}")
        sys.exit(130)


async def _demo(folder: Path, settings: RunSettings, experiences: int, accept_environment: bool) -> bool:
    """Whether the run came to its end."""
    interrupted = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, interrupted.set)
    say("starting four services: env, policy, memory, trainer …")
    source = settings.model.source
    async with LocalServices(folder, model=source, models_folder=_models_folder(source)) as services:
        places = "  ".join(f"{name} {address}" for name, address in services.addresses.items())
        say(f"healthy: {places}  (logs in {services.folder / 'logs'})")
        client = RunClient(services.endpoint("trainer"))  # a service that died is started again within seconds
        try:
            run = await _begin(client, settings, accept_environment)
            does = "trains" if settings.trains else "fills a memory, without training, for"
            trained = f"{settings.algorithm.name} {does} {settings.model.source} in {settings.environment}"
            say(f"run {run.run_id} in {run.folder}: {trained}, steps: {settings.steps}")
            ended = await _until_end_or_interrupt(client, run, services, interrupted)
            if ended:
                await _report(client, run, experiences)
                return True
            say("stopping after this step …")
        finally:
            await client.close()
    return False


def _models_folder(source: str) -> Path:
    """That of a model which is a folder: the services are those of the demo, and load nothing else."""
    return Path(source).parent if Path(source).is_dir() else Path()


async def _begin(client: RunClient, settings: RunSettings, accept_environment: bool) -> RunInfo:
    """The newest run when it can go on with these settings, else a new one."""
    runs = await client.runs()
    if runs and runs[0].state is not RunState.COMPLETED and runs[0].settings == settings:
        return await client.resume(runs[0].run_id, accept_environment=accept_environment)
    if runs and runs[0].state is RunState.RUNNING:
        await client.stop(runs[0].run_id)
        async for _ in client.watch(runs[0].run_id):
            pass
    return await client.start(f"demo-{len(runs) + 1}", settings)


async def _until_end_or_interrupt(
    client: RunClient, run: RunInfo, services: LocalServices, interrupted: asyncio.Event
) -> bool:
    """Shows progress. False when a signal came first. Raises ServiceFailed, or DomainError when the run failed."""
    showing = asyncio.create_task(show(run, client.watch(run.run_id), lambda: client.get(run.run_id)))
    others = [asyncio.create_task(interrupted.wait()), asyncio.create_task(services.failed())]
    try:
        await asyncio.wait([showing, *others], return_when=asyncio.FIRST_COMPLETED)
        if others[1].done():
            await others[1]
        if not showing.done():
            return False
        state = showing.result()
        if state is None or state.state != RunState.COMPLETED:
            raise ServiceFailed(
                f"run {run.run_id} ended: {state.state if state else 'unknown'} {state and state.error}"
            )
        return True
    finally:
        await cancel(showing, *others)


async def _report(client: RunClient, run: RunInfo, experiences: int) -> None:
    folder = Path(run.folder)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    entries = [entry async for entry in client.watch(run.run_id)]
    recorded = recorded_rlvr(run.settings)
    await asyncio.to_thread(draw_chart, folder / "chart.png", entries, recorded)
    found = await client.experiences(run.run_id, limit=1000)  # of the first steps
    told = [experience for experience in found if experience.targets][:experiences]
    if told:
        say("\none experience, whole:" if len(told) == 1 else f"\n{len(told)} experiences, whole:")
    for experience in told:
        say("\n".join(lines(experience)))
    say()
    say("\n".join(result_lines(summary, recorded)))
    say(f"\nchart       {folder / 'chart.png'}\nsummary     {folder / 'summary.json'}")
    say("go on       " + "\n            ".join(next_steps(run)))
