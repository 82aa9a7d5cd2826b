"""`mulligan experiences`: prints experiences for people."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from mulligan.cli.connection import DEFAULT_ADDRESSES, TrainerAddress, endpoint, run
from mulligan.cli.out import fail, show
from mulligan.cli.runs import whole_run_id
from mulligan.common.types import Attempt, Experience
from mulligan.trainer.client import RunClient
from mulligan.trainer.journal import journal_file, journaled_steps, read_experiences


def experiences(
    source: Annotated[str, typer.Argument(help="A run's id, or its folder: then no service is needed.")],
    step: Annotated[int | None, typer.Option(help="Only this training step, from 0.", min=0)] = None,
    limit: Annotated[int, typer.Option(help="How many.", min=0)] = 3,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line, token ids included.")] = False,
    trainer: TrainerAddress = DEFAULT_ADDRESSES["trainer"],
) -> None:
    """Print journaled experiences: attempt, feedback, reflection, second attempt.

    Example: `mulligan experiences runs/demo/runs/demo-1 --step 10 --limit 1`
    """
    if Path(source).is_dir():
        found = list(_from_folder(Path(source) / "journal", step, limit))
    else:
        found = run(_from_trainer(source, step, limit, trainer))
    if not found:
        fail("no experiences")
    for experience in found:
        show(msgspec.json.encode(experience).decode() if json else "\n".join(lines(experience)))


def _from_folder(journal: Path, step: int | None, limit: int) -> Iterator[Experience]:
    for number in journaled_steps(journal) if step is None else [step]:
        if journal_file(journal, number).exists():
            for experience in read_experiences(journal_file(journal, number)):
                if limit == 0:
                    return
                limit -= 1
                yield experience


async def _from_trainer(run_id: str, step: int | None, limit: int, trainer: str) -> list[Experience]:
    client = RunClient(endpoint(trainer))
    try:
        return await client.experiences(await whole_run_id(client, run_id), step, limit)
    finally:
        await client.close()


def lines(experience: Experience) -> Iterator[str]:
    """All lines of an experience."""
    yield f"═══ {experience.experience_id}  ({experience.environment} {experience.task_id})"
    yield from _attempt("first attempt", experience.first_attempt)
    reflection = experience.reflection
    if reflection is not None:
        used = ", ".join(experience.memory_entry_ids) or "nothing"
        writer = f"{reflection.policy or 'policy'} version {reflection.policy_version}"
        yield f"─── reflection, written by {writer}; shown from memory: {used}"
        yield from _indented(reflection.text or f"({reflection.outcome}: {reflection.error})")
    if experience.second_attempt is not None:
        yield from _attempt("second attempt", experience.second_attempt)
    if experience.distilled is not None:
        trained = sum(sequence.sampled_count for sequence in experience.distilled.sequences)
        yield f"─── distilled: the {trained} sampled tokens of the second attempt, under the first attempt's prompt"


def _attempt(title: str, attempt: Attempt) -> Iterator[str]:
    reward = "no reward" if attempt.reward is None else f"reward {attempt.reward:g}"
    yield f"─── {title}: {attempt.outcome}, {reward}"
    for turn in attempt.turns:
        yield from _indented(turn.observation)
        yield f"    → {turn.action}"
    yield from _indented(attempt.final_observation)
    yield f"    {attempt.feedback or attempt.error}"


def _indented(text: str) -> Iterator[str]:
    return (f"    {line}" for line in text.expandtabs(2).splitlines())
