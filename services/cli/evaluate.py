"""`mulligan eval`: first attempts on the test tasks, with a policy as it serves now."""

from __future__ import annotations

from typing import Annotated

import typer

from services.cli.connection import DEFAULT_ADDRESSES, TrainerAddress, endpoint, run
from services.trainer.client import RunClient
from services.trainer.settings import EvaluationSettings


def evaluate(
    environment: Annotated[str, typer.Argument(help="Name of an environment at the environment service.")],
    tasks: Annotated[int, typer.Option(help="How many test tasks; 0 means all.")] = 0,
    samples: Annotated[int, typer.Option(help="Attempts per task.")] = 4,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option()] = 0.8,
    top_k: Annotated[int, typer.Option(help="0 means all.")] = 20,
    max_tokens: Annotated[int, typer.Option(help="Tokens of one turn.")] = 1024,
    seed: Annotated[int, typer.Option()] = 0,
    run_id: Annotated[str, typer.Option("--run", help="Publish this run's last checkpoint first.")] = "",
    policy: Annotated[
        str, typer.Option(help="Name of a policy of the policy service; its default one, or the run's.")
    ] = "",
    trainer: TrainerAddress = DEFAULT_ADDRESSES["trainer"],
) -> None:
    """Measure a policy as it serves now, or a run's last checkpoint: first attempts, no reflection in context.

    Example: `mulligan eval frozenlake-3x3 --run demo-1 --samples 1 --temperature 0`
    """
    settings = EvaluationSettings(tasks=tasks, samples=samples, temperature=temperature, top_p=top_p, top_k=top_k)
    run(_evaluate(environment, settings, seed, max_tokens, run_id, policy, trainer))


async def _evaluate(
    environment: str, settings: EvaluationSettings, seed: int, max_tokens: int, run_id: str, policy: str, trainer: str
) -> None:
    client = RunClient(endpoint(trainer))
    try:
        result, version = await client.evaluate(
            environment, settings, seed=seed, max_tokens=max_tokens, run_id=run_id, policy=policy
        )
    finally:
        await client.close()
    print(f"success      {result.success:.3f}")
    print(f"mean reward  {result.mean_reward:.3f}")
    print(f"attempts     {result.attempts} ({result.excluded} excluded)")
    print(f"policy       {policy + ' ' if policy else ''}version {version}")
