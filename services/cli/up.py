"""`mulligan up`: the four services on this machine."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import typer

from mulligan.cli.connection import DEFAULT_ADDRESSES, PORT_BASE, addresses_from, program
from mulligan.cli.local import LocalServices, ServiceFailed
from mulligan.cli.out import fail, note
from mulligan.common.config import SERVICES, read_service_tables
from mulligan.env.config import EnvSettings


def up(
    folder: Annotated[Path, typer.Option(help="Gets runs, weights, checkpoints, memory and logs.")] = Path(
        "runs/local"
    ),
    model: Annotated[
        str, typer.Option(help="Hub id, folder, fetched model, or `embedded`: the default if no file names another.")
    ] = "",
    config: Annotated[
        Path | None,
        typer.Option(
            help="TOML file with a table of settings per service: [env], [policy], [memory], [trainer].",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    env_config: Annotated[
        Path | None,
        typer.Option(
            help="TOML file of the env service's settings: which environments it serves ([environments.NAME]).",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    policy_config: Annotated[
        Path | None,
        typer.Option(
            help="TOML file of the policy service's settings: other backends, further policies ([policies.NAME]).",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    models_folder: Annotated[
        Path, typer.Option(help="Models come from below it, or are hub ids.", exists=True, file_okay=False)
    ] = Path(),
    port_base: Annotated[
        int, typer.Option(min=1, max=65532, help="The services listen on this port and those behind it.")
    ] = PORT_BASE,
    log_level: Annotated[str, typer.Option(help="debug, info (a line per request), warning or error.")] = "info",
) -> None:
    """Start the four services on loopback and keep them running until Ctrl-C.

    Unfinished runs go on by themselves. Calls need a token, which your own commands find and other users cannot read.
    Addresses, folders and tokens are those of this command, whatever a file says.

    Example: `mulligan up --env-config env.toml --model Qwen/Qwen3-4B-Instruct-2507`
    """
    try:
        configs = _configs(config, env_config, policy_config)
        addresses = _addresses(port_base, configs.get("env"))
        services = LocalServices(
            folder, model=model, configs=configs, models_folder=models_folder, addresses=addresses, log_level=log_level
        )
        asyncio.run(_up(services))
    except (ServiceFailed, OSError, ValueError) as error:
        fail(error, 2)


def _configs(config: Path | None, env_config: Path | None, policy_config: Path | None) -> dict[str, Path]:
    """The file that each service reads. Raises ValueError where two hold settings of one service."""
    single = {name: file for name, file in (("env", env_config), ("policy", policy_config)) if file}
    if config is None:
        return single
    tables = read_service_tables(config)
    if not tables:
        names = ", ".join(f"[{name}]" for name in SERVICES)
        raise ValueError(f"--config {config}: none of {names}; --env-config and --policy-config take one service's")
    for name, file in single.items():
        if name in tables:
            raise ValueError(f"--{name}-config {file}: {config} has the table [{name}], too; give one of them")
    return dict.fromkeys(SERVICES, config) | single


def _addresses(port_base: int, env_config: Path | None) -> dict[str, str]:
    """Several env processes need consecutive ports, and take those behind the other services."""
    addresses = addresses_from(port_base)
    processes = EnvSettings.load(["--config", str(env_config)] if env_config else []).processes
    if processes > 1:
        first = port_base + len(addresses)
        addresses["env"] = f"127.0.0.1:{first}-{first + processes - 1}"
    return addresses


def _next_steps(addresses: Mapping[str, str]) -> Iterator[str]:
    yield f"ready: in another terminal, {program()} train frozenlake-3x3; Ctrl-C ends the services"
    if addresses != DEFAULT_ADDRESSES:
        there = " ".join(f"MULLIGAN_CLI_{name.upper()}={address}" for name, address in addresses.items())
        yield f"commands find them by: export {there}"


async def _up(services: LocalServices) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    note("starting env, policy, memory and trainer …")
    async with services:
        for name, address in services.addresses.items():
            note(f"{name:<8} {address:<18} {services.folder / 'logs' / f'{name}.log'}")
        note(f"tokens   {services.tokens.of('trainer')}; {services.tokens.of('env')}: you alone can read them")
        for step in _next_steps(services.addresses):
            note(step)
        stopped = asyncio.create_task(stop.wait())
        failed = asyncio.create_task(services.failed())
        await asyncio.wait([stopped, failed], return_when=asyncio.FIRST_COMPLETED)
        if failed.done():
            await failed
        failed.cancel()
        note("ending …")
