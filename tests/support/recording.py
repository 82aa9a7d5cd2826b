"""Makes the recording that `mulligan ui --demo` shows: `make recording`, or `python -m tests.support.recording FOLDER`.

Three runs of the embedded model on this machine, by recipes of the package: the memory alone, ERL with its memory, and
RLVR. They take about ten minutes on two cores; a run that is complete in FOLDER is not made again. Kept are all metrics
and events, of the memory the latest ENTRIES entries of each run and those with the most uses, of each step the
experiences of the groups SLOTS and those in which these entries were written; no weights and no checkpoints.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Set
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import msgspec

from mulligan.cli.local import LocalServices
from mulligan.cli.train import read_settings
from mulligan.common.experience import Trained
from mulligan.common.reflections import Explained, Uplift
from mulligan.console.recording import ANSWERS, FILE, RecordedAnswers
from mulligan.console.services import Services
from mulligan.trainer.client import RunClient
from mulligan.trainer.folder import RunFolder, RunState
from mulligan.trainer.journal import (
    SampleRecorded,
    StepCompleted,
    StepJournal,
    StepStarted,
    StepTrained,
    journal_file,
    journaled_steps,
    read_experiences,
    read_records,
    slot_of,
)
from tests.support.paths import ROOT

ABOUT = "three runs of the embedded model on FrozenLake, of each step the experiences of two tasks."
# The id of each run, its recipe, and settings over it. The memory alone comes first, with the weights of the package.
RUNS: tuple[tuple[str, str, list[str]], ...] = (
    ("memory-alone", "frozenlake-3x3-memory", ["rollout.tasks_per_step=16", "steps=16"]),
    ("erl", "frozenlake-3x3", ["algorithm.memory_strategy=best_uplift"]),
    ("rlvr", "frozenlake-3x3-rlvr", []),
)
SLOTS = range(2)
ENTRIES = 40
_KEPT = ("run.json", "events.jsonl", "environment.json", "summary.json")


async def record(folder: Path) -> RecordedAnswers:
    """Runs what is not complete, and asks the services."""
    async with LocalServices(folder) as services:
        client = RunClient(services.endpoint("trainer"))
        known = {run.run_id: run for run in await client.runs()}
        for name, recipe, overrides in RUNS:
            if name in known and known[name].state is RunState.COMPLETED:
                continue
            print(f"{name}: {recipe}", flush=True)
            if name in known:
                await client.resume(name)
            else:
                await client.start(name, read_settings(Path(recipe), overrides))
            async for _ in client.watch(name):
                pass
            if (ended := await client.get(name)).state is not RunState.COMPLETED:
                raise RuntimeError(f"{name} ended: {ended.state} {ended.error}")
        await client.close()
        return await answers(Services({name: services.endpoint(name) for name in services.addresses}))


async def answers(services: Services) -> RecordedAnswers:
    entries = (await services.entries("")).found or []
    chosen = [one.reflection_id for one in sorted(entries, key=lambda one: -_uses(one.uplift))[:ENTRIES]]
    for name, _, _ in RUNS:
        chosen += [one.reflection_id for one in entries if one.scope == name][:ENTRIES]
    told: list[Explained] = []
    for entry in entries:
        if entry.reflection_id in chosen:
            found = (await services.entry(entry.reflection_id)).found
            assert found is not None
            told.append(found)
    prompts = (await services.prompts()).found
    assert prompts is not None
    health, policies = list(await services.health()), await services.policies()
    return RecordedAnswers(datetime.now(UTC), version("mulligan"), ABOUT, health, policies, told, prompts)


def _uses(uplift: Uplift | None) -> int:
    return 0 if uplift is None else uplift.uses_shown + uplift.uses_left_out


def keep(source: RunFolder, target: Path, cited: Set[str]) -> None:
    """Copies what the recording has of a run. `cited` are ids of experiences that it has in any case."""
    (target / "journal").mkdir(parents=True)
    for name in _KEPT:
        if (source.path / name).exists():
            shutil.copyfile(source.path / name, target / name)
    for step in journaled_steps(source.journal):
        _keep_step(journal_file(source.journal, step), StepJournal(target / "journal", step), cited)


def _keep_step(file: Path, journal: StepJournal, cited: Set[str]) -> None:
    found = read_experiences(file)
    experiences = [one for one in found if slot_of(one.experience_id) in SLOTS or one.experience_id in cited]
    kept = {sample.sample_id for one in experiences for sample in one.samples}
    kept |= {target.target_id for one in experiences for target in one.targets}
    trained: list[Trained] = []
    for entry, _ in read_records(file):
        match entry:
            case StepStarted():
                journal.start(entry)
            case SampleRecorded(sample) if sample.sample_id in kept:
                journal.add(sample)
            case StepTrained(data):
                trained = [datum for datum in data if datum.source_id in kept]
            case StepCompleted():
                journal.finish(entry)
    for one in experiences:
        journal.complete(one)
    journal.train(trained)
    journal.close()


def archive(folder: Path, file: Path) -> None:
    """The same bytes for the same files."""
    with tarfile.open(file, "w:xz", preset=9, format=tarfile.PAX_FORMAT) as written:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                member = tarfile.TarInfo(str(path.relative_to(folder)))
                member.size = path.stat().st_size
                with path.open("rb") as content:
                    written.addfile(member, content)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/recording")
    found = asyncio.run(record(folder))
    cited = {one.reflection.provenance.experience_id for one in found.entries}
    with tempfile.TemporaryDirectory() as kept:
        for name, _, _ in RUNS:
            keep(RunFolder(folder / "runs" / name), Path(kept) / name, cited)
        (Path(kept) / ANSWERS).write_bytes(msgspec.json.encode(found))
        file = ROOT / "services" / "console" / FILE
        archive(Path(kept), file)
    print(f"{file.relative_to(ROOT)}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
