"""`mulligan policy`: the models that the policy service serves, and the versions of their weights.

If the address names several servers, every one is called. The program ends with status 1 if one of them fails.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import typer

from mulligan.cli.connection import DEFAULT_ADDRESSES, PolicyAddress, command, endpoint, run, said
from mulligan.cli.out import fail, note, table, working
from mulligan.cli.out import show as show_line
from mulligan.cli.overrides import read_overrides
from mulligan.common.addresses import Addresses
from mulligan.common.errors import CallFailed, DomainError, ServiceUnavailable
from mulligan.common.inference import PolicyInfo, PolicyVersion
from mulligan.common.secret_flags import secrets_among
from mulligan.policy.client import PolicyClient
from mulligan.policy.key_file import read_key

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
    answers = _call(address, lambda client: client.policies())
    rows = [
        (
            *answers.at(server),
            info.name,
            _state(info),
            str(info.policy_version),
            info.backend,
            info.model,
            _engines(info),
        )
        for server, infos in answers.found.items()
        for info in infos
    ]
    columns = (*answers.at("server"), "policy", "state", "version", "backend", "model", "engines")
    table(columns, rows, whole=("server", "policy", "version", "model"))
    answers.done()


@policy.command()
def show(name: Name = "", address: PolicyAddress = DEFAULT_ADDRESSES["policy"]) -> None:
    """Print everything that is known of a policy.

    Example: `mulligan policy show actor`
    """
    answers = _call(address, lambda client: client.info(name))
    for server, info in answers.found.items():
        _show(info, *answers.at(server))
    answers.done()


def _show(info: PolicyInfo, server: str = "") -> None:
    lines = {
        "server": server,
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
            show_line(f"{key:<12} {value}")


@policy.command()
def load(
    name: NameOf,
    model: Annotated[
        str, typer.Option(help="Hub id, `embedded`, fetched model, or a folder below the service's models folder.")
    ],
    backend: Annotated[str, typer.Option(help="What runs the model; the policy's own when left out.")] = "",
    override: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the policy as NAME=VALUE; repeatable.")
    ] = None,
    secret: Annotated[
        list[str] | None,
        typer.Option(
            help="A setting as NAME=FILE; FILE has its value, such as a key. Repeatable.", metavar="NAME=FILE"
        ),
    ] = None,
    address: PolicyAddress = DEFAULT_ADDRESSES["policy"],
) -> None:
    """Replace the model of a policy, or add a policy, while the service runs.

    Returns once the new model serves. Episodes that began on the old one finish on it. To train the new one, name it in
    the run's `model.source`.

    Example: `mulligan policy load actor --model Qwen/Qwen3-4B-Instruct-2507 --set context_length=8192`
    """
    options = _without_secrets(read_overrides(override or [])) | _read_secrets(secret or [])
    folder = Path(model)
    source = str(folder.resolve()) if folder.is_dir() else model
    with working(f"loading {model}"):
        answers = _call(address, lambda client: _load(client, name, source, backend, options))
    for server, (version, fingerprint, before) in answers.found.items():
        said = f"policy {name} serves {model} as version {version} (fingerprint {fingerprint or 'not known'})"
        if before is not None and before.policy_version == version:
            said = f"policy {name} serves {model} already, as version {version}: nothing was loaded"
            if version > 0:
                said += (
                    f". Its weights may have been trained since. For those that it began with: "
                    f"{command('policy', 'versions', name)}, then {command('policy', 'rollback', name, 'VERSION')}"
                )
        show_line(*answers.at(server), said)
    answers.done()


def _without_secrets(options: dict[str, Any]) -> dict[str, Any]:
    """Ends the program if one of them is a secret: other users see options."""
    from mulligan.policy.config import PolicyModelSettings

    for name, value in options.items():
        *tables, last = name.split(".")
        given: dict[str, Any] = {last: value}
        for name_of_table in reversed(tables):
            given = {name_of_table: given}
        for setting, problem in secrets_among(PolicyModelSettings, given):
            fail(f"--set {setting}: {problem}, and other users see options: expected --secret {setting}=FILE", 2)
    return options


def _read_secrets(secrets: Sequence[str]) -> dict[str, Any]:
    """Ends the program if one is not NAME=FILE."""
    found: dict[str, Any] = {}
    for one in secrets:
        name, _, file = one.partition("=")
        if not name or not file:
            fail("--secret: expected NAME=FILE", 2)
        try:
            key = read_key(Path(file))
        except ValueError as error:
            fail(f"--secret {name}: {error}", 2)
        assert key is not None
        found[name] = key.get_secret_value()
    return found


async def _load(
    client: PolicyClient, name: str, source: str, backend: str, options: Mapping[str, Any]
) -> tuple[int, str, PolicyInfo | None]:
    """The version, the fingerprint, and the policy before, or None if it is new."""
    before = {info.name: info for info in await client.policies()}.get(name)
    return *await client.load_model(name, source, backend, options), before


@policy.command()
def unload(name: NameOf, address: PolicyAddress = DEFAULT_ADDRESSES["policy"]) -> None:
    """Remove a policy when its calls have finished.

    Example: `mulligan policy unload reflector`
    """
    with working("waiting for its calls"):
        answers = _call(address, lambda client: client.unload_model(name))
    for server in answers.found:
        show_line(*answers.at(server), f"policy {name} is gone")
    answers.done()


@policy.command()
def versions(
    name: Name = "",
    limit: Annotated[int, typer.Option(help="How many.", min=1)] = 20,
    address: PolicyAddress = DEFAULT_ADDRESSES["policy"],
) -> None:
    """List the versions of a policy's weights, newest first.

    Example: `mulligan policy versions actor --limit 5`
    """
    answers = _call(address, lambda client: client.versions(name))
    rows = [
        (*answers.at(server), *_version(version))
        for server, known in answers.found.items()
        for version in known[:limit]
    ]
    columns = (*answers.at("server"), "version", "state", "since", "model", "kind", "canary", "problem")
    table(columns, rows, whole=("server", "version"))
    answers.done()


@policy.command()
def rollback(
    name: NameOf,
    version: Annotated[int, typer.Argument(help="One that `mulligan policy versions` shows as kept.")],
    address: PolicyAddress = DEFAULT_ADDRESSES["policy"],
) -> None:
    """Serve an earlier version again. Later ones are withdrawn for good, and a run that trains the policy fails.

    Example: `mulligan policy rollback actor 41`
    """
    with working(f"loading version {version}"):
        answers = _call(address, lambda client: client.rollback(version, name))
    for server in answers.found:
        show_line(*answers.at(server), f"policy {name} serves version {version}")
    answers.done()


@dataclass(frozen=True)
class _Answers(Generic[T]):
    """The answer or the failure of each server. A single server is not named in the output."""

    found: Mapping[str, T]
    failures: Mapping[str, BaseException]
    several: bool

    def at(self, server: str) -> tuple[str, ...]:
        return (server,) if self.several else ()

    def done(self) -> None:
        """If servers failed, prints a line for each and ends the program with status 1."""
        if self.failures:
            for server, failure in self.failures.items():
                note(f"error: {server}: {said(failure)}")
            sys.exit(1)


def _call(address: str, ask: Callable[[PolicyClient], Awaitable[T]]) -> _Answers[T]:
    """Calls every server that the address names."""
    try:
        addresses = Addresses.parse(address)
    except ValueError as error:
        fail(f"--policy-address: {error}", 2)

    async def one(server: str) -> T:
        client = PolicyClient(endpoint(server), update_timeout=LOAD_SECONDS)
        try:
            return await ask(client)
        finally:
            await client.close()

    async def main() -> _Answers[T]:
        if addresses.single:
            return _Answers({address: await one(address)}, {}, several=False)
        try:
            servers = await addresses.look_up()
        except OSError as error:
            fail(f"--policy-address: {error}")
        answers = await asyncio.gather(*map(one, servers), return_exceptions=True)
        found: dict[str, T] = {}
        failures: dict[str, BaseException] = {}
        for server, answer in zip(servers, answers, strict=True):
            if not isinstance(answer, BaseException):
                found[server] = answer
            elif isinstance(answer, DomainError | CallFailed | ServiceUnavailable):
                failures[server] = answer
            else:
                raise answer
        return _Answers(found, failures, several=True)

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
