"""A service that is killed amid writes, and a disk that loses what was not synced: nothing acknowledged is lost.

The same hundreds of times: `python -m proof --only memory-crashes`.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa

from mulligan.common.channel import Endpoint
from mulligan.memory.client import MemoryClient
from mulligan.memory.stores._sql.migrations.versions import v5_checksums
from mulligan.testing.faulty_play import BrokenPromise
from mulligan.testing.memory_ledger import Ledger, check_sqlite
from mulligan.testing.memory_writers import DATABASE, Writers, write_and_lose_power, write_under_kills
from mulligan.testing.power_loss import CannotRecord
from mulligan.testing.processes import ServiceProcesses
from tests.support.found import require_strace


async def test_what_was_acknowledged_survives_kills(services: ServiceProcesses, tmp_path: Path) -> None:
    database = tmp_path / DATABASE
    server = services.start("memory", database=database)
    found = await write_under_kills(server, partial(check_sqlite, database), kills=3, seed=0)
    assert found["kills"] == 3 and found["found"]["versions"] > 20
    assert all(found["answered"][do] for do in ("add", "revise", "draw", "report"))


async def test_what_was_acknowledged_survives_a_loss_of_power(tmp_path: Path) -> None:
    try:
        found = await write_and_lose_power(tmp_path, calls=60, losses=10, seed=0)
    except CannotRecord as reason:
        require_strace(f"no loss of power to test with: {reason}")
    else:
        assert found["losses"] == 10 and found["events"]["synced"] > 20


async def test_a_commit_that_is_not_synced_is_noticed(tmp_path: Path) -> None:
    try:
        with pytest.raises(BrokenPromise, match="is lost"):
            await write_and_lose_power(tmp_path, calls=60, losses=20, seed=0, synced=False)
    except CannotRecord as reason:
        require_strace(f"no loss of power to test with: {reason}")


@pytest.fixture(scope="module")
def written(shared_services: ServiceProcesses, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ledger]:
    """A database after some calls, and the calls."""
    database = tmp_path_factory.mktemp("written") / DATABASE
    server = shared_services.start("memory", database=database)
    ledger = Ledger()

    async def write() -> None:
        client = MemoryClient(Endpoint(server.address))
        await Writers(ledger, random.Random(0)).write(client, 150)
        await client.close()

    asyncio.run(write())
    server.stop()
    return database, ledger


A_RULE = "(SELECT min(position) FROM reflections WHERE kind = 'rule' AND deleted_version IS NULL)"
DOCUMENTS = "(SELECT position FROM reflections WHERE kind = 'document')"


@pytest.mark.parametrize(
    ("damage", "noticed"),
    [
        ("DELETE FROM changes WHERE id = (SELECT max(id) FROM changes)", "versions"),
        ("UPDATE changes SET version = version + 1 WHERE version > 5", "versions"),
        ("UPDATE scopes SET entries = entries + 1", "counted"),
        (f"UPDATE texts SET text = substr(text, 1, 20) WHERE position = {A_RULE}", "has the text"),
        (f"UPDATE reflections SET success = 0 WHERE position = {A_RULE}", "another origin"),
        (f"UPDATE reflections SET deleted_version = 9 WHERE position = {A_RULE}", "counted"),
        (f"UPDATE texts SET text = text || ' ' || text WHERE position IN {DOCUMENTS}", "there twice"),
        ("DELETE FROM used_entries WHERE place = 0", "is lost"),
        ("UPDATE uses SET reward = NULL WHERE id = (SELECT min(id) FROM uses WHERE reward NOT NULL)", "half of it"),
        ("UPDATE standings SET uses_shown = uses_shown + 1 WHERE uses_shown > 0", "evidence"),
        ("UPDATE standings SET mean_shown = mean_shown / 2 WHERE mean_shown > 0", "other rewards"),
        ("DELETE FROM sources", "lost its sources"),
        (f"DELETE FROM standings WHERE position = {A_RULE}", "counted"),
        (f"UPDATE standings SET environment = 'maze' WHERE position = {A_RULE}", "finds"),
    ],
)
async def test_damage_is_noticed(written: tuple[Path, Ledger], tmp_path: Path, damage: str, noticed: str) -> None:
    path, ledger = written
    database = Path(shutil.copy(path, tmp_path))
    await check_sqlite(database, ledger)
    engine = sa.create_engine(f"sqlite:///{database}")
    with engine.begin() as db:
        assert db.execute(sa.text(damage)).rowcount > 0
        v5_checksums.fill(db)  # as if the store had written it so
    engine.dispose()
    with pytest.raises(BrokenPromise, match=noticed):
        await check_sqlite(database, ledger)
