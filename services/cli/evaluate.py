"""`mulligan eval`: first attempts on the test tasks, with a policy as it serves now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from mulligan.cli.connection import DEFAULT_ADDRESSES, TrainerAddress, endpoint, run
from mulligan.cli.out import fail, show
from mulligan.cli.overrides import read_overrides
from mulligan.cli.progress import EvaluationDisplay, by_protocol
from mulligan.cli.run_credentials import recall_credential
from mulligan.cli.runs import whole_run_id
from mulligan.common.errors import DomainError
from mulligan.trainer.client import RunClient
from mulligan.trainer.settings import EvaluationSettings
from mulligan.trainer.wire import validated


def evaluate(
    environment: Annotated[str, typer.Argument(help="Name of an environment at the environment service.")],
    tasks: Annotated[int, typer.Option(help="How many test tasks; 0 means all.", min=0)] = 0,
    samples: Annotated[int, typer.Option(help="Attempts per task.", min=1)] = 4,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.7,
    top_p: Annotated[float, typer.Option(help="Above 0, at most 1.", max=1)] = 0.8,
    top_k: Annotated[int, typer.Option(help="0 means all.", min=0)] = 20,
    max_tokens: Annotated[int, typer.Option(help="Tokens of one turn.", min=1)] = 1024,
    seed: Annotated[int, typer.Option(help="Of all random choices.", min=0)] = 0,
    run_id: Annotated[str, typer.Option("--run", help="Publish this run's last checkpoint first.")] = "",
    policy: Annotated[
        str, typer.Option(help="Name of a policy of the policy service; its default one, or the run's.")
    ] = "",
    protocol: Annotated[
        list[str] | None, typer.Option(help="Measure by this protocol, too, such as pass_at_k; repeatable.")
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of the protocol: NAME=VALUE, or PROTOCOL.NAME=VALUE; repeatable."),
    ] = None,
    trainer: TrainerAddress = DEFAULT_ADDRESSES["trainer"],
) -> None:
    """Measure a policy as it serves now, or a run's last checkpoint: first attempts, no reflection in context.

    Example: `mulligan eval frozenlake-3x3 --run demo-1 --samples 1 --temperature 0`

    Example: `mulligan eval frozenlake-3x3 --protocol pass_at_k --set k=[1,8]`
    """
    plain = {"tasks": tasks, "samples": samples, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    protocols = _protocols(protocol or [], read_overrides(override or []))
    try:
        settings = validated(EvaluationSettings, plain | {"protocols": protocols})
    except DomainError as error:
        fail(error, 2)
    run(_evaluate(environment, settings, seed, max_tokens, run_id, policy, trainer))


def _protocols(names: Sequence[str], overrides: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A table for each protocol. Ends the program for a setting of none."""
    tables: dict[str, dict[str, Any]] = {name: {"name": name} for name in names}
    for override, value in overrides.items():
        name, _, setting = override.rpartition(".")
        if not name and len(tables) == 1:
            (name,) = tables
        if name not in tables:
            given = ", ".join(tables) or "none is given"
            fail(f"--set {override}: expected PROTOCOL.NAME with a protocol of --protocol ({given})", 2)
        tables[name][setting] = value
    return list(tables.values())


async def _evaluate(
    environment: str, settings: EvaluationSettings, seed: int, max_tokens: int, run_id: str, policy: str, trainer: str
) -> None:
    client = RunClient(endpoint(trainer))
    try:
        whole = await whole_run_id(client, run_id) if run_id else ""
        if whole:
            recall_credential(client, trainer, whole)
        with EvaluationDisplay(environment) as display:
            result, version = await client.evaluate(
                environment,
                settings,
                seed=seed,
                max_tokens=max_tokens,
                run_id=whole,
                policy=policy,
                on_progress=display.update,
            )
    finally:
        await client.close()
    show(f"success      {result.success:.3f}")
    show(f"mean reward  {result.mean_reward:.3f}")
    show(f"attempts     {result.attempts} ({result.excluded} excluded)")
    for label, metrics in by_protocol(result.metrics).items():
        show(label)
        for name, value in metrics.items():
            show(f"  {name:<{max(map(len, metrics))}}  {value:.3f}")
    show(f"policy       {policy + ' ' if policy else ''}version {version}")
