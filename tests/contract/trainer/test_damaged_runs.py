"""A trainer whose runs have damaged files: it starts, lists all of them, says what is wrong, and trains the others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.testing.loop import Loop, small_run
from mulligan.testing.processes import ServiceProcesses
from mulligan.trainer.events import NoticeEvent
from mulligan.trainer.folder import RunFolder, RunState

SETTINGS = small_run(steps=1, checkpoint_every=1)


async def test_damaged_runs_leave_the_others_listed_and_runnable(services: ServiceProcesses, tmp_path: Path) -> None:
    loop = Loop.start(services, tmp_path)
    await loop.train("whole", SETTINGS)
    loop.trainer.stop()
    runs = tmp_path / "runs"
    for name, state in (
        ("no-settings", RunState.RUNNING),
        ("no-checkpoint", RunState.STOPPED),
        ("no-event", RunState.COMPLETED),
        ("no-number", RunState.RUNNING),
        ("no-time", RunState.STOPPED),
    ):
        folder = RunFolder(runs / name)
        folder.create(name, SETTINGS)
        folder.write_record(folder.record().now(state))
        shutil.copy(runs / "whole" / "events.jsonl", folder.events_file)
    (runs / "no-settings" / "run.json").write_bytes(b"\x00" * 500)
    (runs / "no-checkpoint" / "checkpoint.json").write_bytes(b'{"name": "no-chec')
    for name, changes in (("no-number", {"steps": 10**400}), ("no-time", {"environment": 5})):
        record = json.loads((runs / name / "run.json").read_text())
        del record["crc32"]
        record["settings"] |= changes
        record["created_at"] = "9999-12-31T23:59:59.999999" + ("Z" if name == "no-number" else "")
        (runs / name / "run.json").write_text(json.dumps(record))
    shutil.copytree(runs / "whole", runs / "whole (copy)")
    events = runs / "no-event" / "events.jsonl"
    lines = events.read_bytes().splitlines(keepends=True)
    events.write_bytes(b"".join([lines[0], lines[1][:9] + b"\n", *lines[2:]]) + b'{"number":9,"ti')
    loop.trainer.start()
    client = loop.client()
    try:
        listed = {run.run_id: run for run in await client.runs()}
        assert set(listed) == {"whole", "no-settings", "no-checkpoint", "no-event", "no-number", "no-time"}
        assert "steps: the contract does not hold this value" in listed["no-number"].error
        assert "environment: Input should be a valid string" in listed["no-time"].error
        assert listed["whole"].state is listed["no-event"].state is RunState.COMPLETED
        assert f"{runs / 'no-settings' / 'run.json'} is damaged" in listed["no-settings"].error
        assert f"{runs / 'no-checkpoint' / 'checkpoint.json'} is damaged" in listed["no-checkpoint"].error
        for name, file in (("no-settings", "run.json"), ("no-checkpoint", "checkpoint.json")):
            with pytest.raises(DomainError) as caught:
                await client.resume(name)
            assert caught.value.reason is Reason.STATE_DAMAGED
            assert caught.value.metadata == {"file": str(runs / name / file)}
        numbers = [entry.number async for entry in client.watch("no-event")]
        assert numbers == [1, *range(3, len(lines) + 1)]
        assert (await loop.train("another", SETTINGS)).state is RunState.COMPLETED
        told = [entry.event async for entry in client.watch("another")]
        assert not any(isinstance(event, NoticeEvent) and "damaged" in event.text for event in told)
        (runs / "no-checkpoint" / "checkpoint.json").unlink()
        await client.resume("no-checkpoint")
        await loop.ended(client, "no-checkpoint")
    finally:
        await client.close()
