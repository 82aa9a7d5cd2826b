"""The experiment as a whole, through a store: queries draw which entry is left out, outcomes are reported, and the
status of the entries follows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from mulligan.common.reflections import ReflectionQuery, ReflectionStatus, RetrievalStrategy, Trial, UseOutcome
from mulligan.memory.retrieval import retrieve
from mulligan.memory.store import Store
from mulligan.memory.stores import sqlite
from mulligan.memory.trials import with_uses
from tests.support.stores import ORIGIN, new

GROUPS, ROUNDS, USES = 8, 12, 100
EFFECTS = {"harmful": -0.3, "helpful": 0.3, "bystander": 0.0, "another": 0.0}  # of the entries of a group


async def attempts(store: Store, group: str, names: dict[str, str], number: int, rng: np.random.Generator) -> None:
    """A round of attempts that are shown the entries of a group, but the one that is left out. Success has the rate 0.5
    and the effects of what is shown."""
    strategy = RetrievalStrategy.EXPLORE  # it retrieves what is quarantined, too
    query = ReflectionQuery("scope", ORIGIN.environment, strategy, len(EFFECTS), key=group)
    trial = Trial(tuple(f"{group}-{number}-{use}" for use in range(USES)), holdout=0.5, seed=3)
    found = await with_uses(await retrieve(query, store), "scope", trial, store)
    assert {one.reflection_id for one in found.reflections} == names.keys()
    outcomes = []
    for use in found.uses:
        shown = [name for identity, name in names.items() if identity != use.left_out_id]
        rate = 0.5 + sum(EFFECTS[name] for name in shown)
        outcomes.append(UseOutcome(use.use_id, float(rng.random() < rate)))
    assert await store.report(outcomes) == USES


async def test_what_harms_is_quarantined_and_hardly_anything_else(tmp_path: Path) -> None:
    """8 harmful entries, 8 helpful ones and 16 bystanders, with an effect of 0.3. Each is left out of about 150 uses.

    In the end at least 95 % of the harmful are quarantined. At no time more than 2 % of the others are, and at least
    95 % of the bystanders' intervals contain 0 at all times. Draws and rewards have seeds, so it ends the same each
    time."""
    rng = np.random.default_rng(0)
    store = await sqlite.open(str(tmp_path / "memory.db"), sqlite.Settings())
    groups: dict[str, dict[str, str]] = {}
    for group in map(str, range(GROUPS)):
        ids = [
            (await store.add(new(f"{name} {group}", f"{name} {group}", key=group))).reflection_id for name in EFFECTS
        ]
        groups[group] = dict(zip(ids, EFFECTS, strict=True))
    falsely: set[str] = set()
    missed: set[str] = set()
    for number in range(ROUNDS):
        for group, names in groups.items():
            await attempts(store, group, names, number, rng)
        entries = [(name, await store.get(one)) for names in groups.values() for one, name in names.items()]
        for name, entry in entries:
            assert entry.uplift is not None
            if name != "harmful" and entry.status is ReflectionStatus.QUARANTINED:
                falsely.add(entry.reflection_id)
            if not EFFECTS[name] and not entry.uplift.lower <= 0 <= entry.uplift.upper:
                missed.add(entry.reflection_id)
    await store.close()
    left_out = [entry.uplift.uses_left_out for _, entry in entries if entry.uplift]
    assert min(left_out) > 100 and 140 < np.mean(left_out) < 160
    last = Counter((name, entry.status) for name, entry in entries)
    assert last["harmful", ReflectionStatus.QUARANTINED] >= 0.95 * GROUPS
    assert last["helpful", ReflectionStatus.ACTIVE] >= 0.95 * GROUPS
    assert len(falsely) <= 0.02 * 3 * GROUPS and len(missed) <= 0.05 * 2 * GROUPS
