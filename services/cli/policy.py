"""`mulligan policy`: the models that the policy service serves, and the versions of their weights."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from services.cli.connection import DEFAULT_ADDRESSES, PolicyAddress, admin_token, endpoint, run
from services.cli.overrides import read_overrides
from services.common.inference import PolicyInfo, PolicyVersion
from services.policy.client import PolicyClient

policy = typer.Typer(
    help="Look after the policies: `list`, `show`, `load`, `unload`, `versions`, `rollback`.", no_args_is_help=True
)
Name = Annotated[str, typer.Argument(help="As `mulligan policy list` shows it; the default policy when left out.")]
NameOf = Annotated[str, typer.Argument(metavar="NAME", help="As `mulligan policy list` shows it.")]
LOAD_SECONDS = 3600.0  # a large model comes from the hub
T = TypeVar("T")


@policy.command("list")
def list_policies(address: PolicyAddress = DEFAULT_ADDRESSES["policy"]) -> None:
    """List the policies, each with its model and the version that serves.

    Example: `mulligan policy list --policy-address 10.0.0.7:50052`
    """
    table = Table("policy", "state", "version", "backend", "model", "engines", box=None)
    for info in _call(address, lambda client: client.policies()):
        table.add_row(info.name, _state(info), str(info.policy_version), info.backend, info.model, _engines(info))
    Console().print(table)


@policy.command()
def show(name: Name = "", address: PolicyAddress = DEFAULT_ADDRESSES["policy"]) -> None:
    """Print all that a policy says of itself.

    Example: `mulligan policy show actor`
    """
    info = _call(address, lambda client: client.info(name))
    lines = {
        "policy": info.name,
        "state": _state(info),
        "model": f"{info.model} ({info.backend})",
        "version": str(info.policy_version),
        "fingerprint": info.fingerprint,
        "context": f"{info.context_length} tokens" if info.context_length else "not known",
        "vocabulary": str(info.vocabulary_size) if info.vocabulary_size else "not known",
        "features": ", ".join(sorted(info.features)),
        "adapters": ", ".join(info.adapters),
        "weights": "frozen" if info.frozen else "can be updated",
        "engines": _engines(info),
        "draining": f"{info.draining_models} replaced models finish their sessions" if info.draining_models else "",
    }
    for key, value in lines.items():
        if value:
            print(f"{key:<12} {value}")


@policy.command()
def load(
    name: NameOf,
    model: Annotated[str, typer.Option(help="Hub id, `embedded`, or a folder below the service's models folder.")],
    backend: Annotated[str, typer.Option(help="transformers, sglang or openai; the policy's own when left out.")] = "",
    override: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the policy as NAME=VALUE; repeatable.")
    ] = None,
    address: PolicyAddress = DEFAULT_ADDRESSES["policy"],
) -> None:
    """Put a model in the place of a policy's, or add a policy, while everything runs.

    Returns once the new model serves. Episodes that began on the old one finish on it. To train the new one, name it in
    the run's `model.source`.

    Example: `mulligan policy load actor --model Qwen/Qwen3-4B-Instruct-2507 --set context_length=8192`
    """
    options = read_overrides(override or [])
    folder = Path(model)
    source = str(folder.resolve()) if folder.is_dir() else model
    with Console(stderr=True).status(f"loading {model} …"):
        version, fingerprint = _call(address, lambda client: client.load_model(name, source, backend, options))
    print(f"policy {name} serves {model} as version {version} (fingerprint {fingerprint or 'not known'})")


@policy.command()
def unload(name: NameOf, address: PolicyAddress = DEFAULT_ADDRESSES["policy"]) -> None:
    """Remove a policy once its calls have finished.

    Example: `mulligan policy unload reflector`
    """
    with Console(stderr=True).status("waiting for its calls …"):
        _call(address, lambda client: client.unload_model(name))
    print(f"policy {name} is gone")


@policy.command()
def versions(
    name: Name = "",
    limit: Annotated[int, typer.Option(help="How many.")] = 20,
    address: PolicyAddress = DEFAULT_ADDRESSES["policy"],
) -> None:
    """List the versions of a policy's weights, newest first.

    Example: `mulligan policy versions actor --limit 5`
    """
    table = Table("version", "state", "since", "model", "kind", "canary", "problem", box=None)
    for version in _call(address, lambda client: client.versions(name))[:limit]:
        table.add_row(*_version(version))
    Console().print(table)


@policy.command()
def rollback(
    name: NameOf,
    version: Annotated[int, typer.Argument(help="One that `mulligan policy versions` shows as kept.")],
    address: PolicyAddress = DEFAULT_ADDRESSES["policy"],
) -> None:
    """Serve an earlier version again. Later ones are withdrawn for good, and a run that trains the policy fails.

    Example: `mulligan policy rollback actor 41`
    """
    with Console(stderr=True).status(f"loading version {version} …"):
        _call(address, lambda client: client.rollback(version, name))
    print(f"policy {name} serves version {version}")


def _call(address: str, ask: Callable[[PolicyClient], Awaitable[T]]) -> T:
    async def main() -> T:
        client = PolicyClient(endpoint(address), admin_token=admin_token(), update_timeout=LOAD_SECONDS)
        try:
            return await ask(client)
        finally:
            await client.close()

    return run(main())


def _state(info: PolicyInfo) -> str:
    return f"{info.state}: {info.problem}" if info.problem else str(info.state)


def _engines(info: PolicyInfo) -> str:
    serving = sum(replica.serving for replica in info.replicas)
    problems = [f"{replica.address} {replica.problem}" for replica in info.replicas if replica.problem]
    return "; ".join([f"{serving} of {len(info.replicas)} serve", *problems])


def _version(version: PolicyVersion) -> tuple[str, ...]:
    difference = "" if version.canary_difference is None else f"{version.canary_difference:.1e}"
    return (
        str(version.policy_version),
        str(version.state),
        f"{version.created_at:%Y-%m-%d %H:%M:%S}",
        version.model,
        str(version.kind),
        difference,
        version.problem,
    )
