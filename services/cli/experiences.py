"""`mulligan experiences`: prints experiences for people."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from mulligan.cli.browse import browse, on_a_terminal
from mulligan.cli.connection import DEFAULT_ADDRESSES, TrainerAddress, endpoint, run
from mulligan.cli.out import fail, json_safe, show
from mulligan.cli.runs import whole_run_id
from mulligan.common.experience import Experience, Sample
from mulligan.trainer.client import RunClient
from mulligan.trainer.journal import journal_file, journaled_steps, read_experiences


def experiences(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="A run's id, or its folder: then no service is needed.")],
    step: Annotated[int | None, typer.Option(help="Only this training step, from 0.", min=0)] = None,
    limit: Annotated[int, typer.Option(help="How many.", min=0)] = 3,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line, token ids included.")] = False,
    trainer: TrainerAddress = DEFAULT_ADDRESSES["trainer"],
) -> None:
    """Look at journaled experiences: what was played and written, in order, and what was trained on instead.

    Without options, a terminal shows a browser of them all, with the extra `browse`. Else the first ones are printed.

    Example: `mulligan experiences runs/demo/runs/demo-1 --step 10 --limit 1`
    """
    if on_a_terminal() and not _given(context) and browse(source, trainer):
        return
    if Path(source).is_dir():
        found = list(_from_folder(Path(source) / "journal", step, limit))
    else:
        found = run(_from_trainer(source, step, limit, trainer))
    if not found:
        fail("no experiences")
    for experience in found:
        whole = json_safe(msgspec.json.encode(experience).decode()) if json else "\n".join(lines(experience))
        show(whole)


def _given(context: typer.Context) -> list[str]:
    """The options of the command line."""
    options = [name for name in context.params if name != "source"]
    return [name for name in options if str(getattr(context.get_parameter_source(name), "name", "")) == "COMMANDLINE"]


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
    yield f"═══ {experience.experience_id}  ({experience.environment} {experience.task_id}, {experience.algorithm})"
    if experience.memory_entry_ids:
        yield f"    shown from memory: {', '.join(experience.memory_entry_ids)}"
    if experience.memory_left_out_id:
        yield f"    left out, to see what it is worth: {experience.memory_left_out_id}"
    for sample in experience.samples:
        yield from _episode(sample) if sample.is_episode else _text(sample)
    for target in experience.targets:
        trained = sum(sequence.sampled_count for sequence in target.sequences)
        role = experience.source(target).role
        yield f"─── {target.role}: the {trained} sampled tokens of {role!r}, under another system prompt"


def _episode(episode: Sample) -> Iterator[str]:
    reward = "no reward" if episode.reward is None else f"reward {episode.reward:g}"
    yield f"─── {episode.role}: {episode.outcome}, {reward}"
    for turn in episode.turns:
        yield from _indented(turn.observation)
        yield f"    → {turn.action}"
    yield from _indented(episode.final_observation)
    yield f"    {episode.feedback or episode.error}"


def _text(text: Sample) -> Iterator[str]:
    yield f"─── {text.role}, written by {text.policy or 'policy'} version {text.policy_version}"
    yield from _indented(text.text or f"({text.outcome}: {text.error})")


def _indented(text: str) -> Iterator[str]:
    return (f"    {line}" for line in text.expandtabs(2).splitlines())
