"""Experiments with retrieved entries: which use leaves out which of them."""

from __future__ import annotations

from mulligan.common.reflections import Retrieved, Trial, Use
from mulligan.memory.draw import draw
from mulligan.memory.store import DrawnUse, Found, Store, use_id


async def with_uses(found: Found, scope: str, trial: Trial, store: Store) -> Retrieved:
    """Draws a use for each key of the trial, and stores them. A key that was drawn before gets the same use.

    Each entry is left out with probability holdout / (number of entries). Raises REQUEST_CONFLICT if a key was drawn
    for other entries, or with another seed or holdout that leaves out another one.
    """
    entries = tuple((one.reflection_id, one.revision) for one in found.reflections)
    if not entries:
        return Retrieved(found.reflections, found.version)
    ids = [identity for identity, _ in entries]
    drawn = []
    for key in trial.use_keys:
        place = draw(trial.seed, key, ids, trial.holdout)
        left_out = "" if place is None else ids[place]
        drawn.append(DrawnUse(use_id(scope, key), key, scope, entries, left_out, trial.holdout / len(ids)))
    await store.record_uses(drawn)
    uses = tuple(Use(one.use_id, one.use_key, one.left_out_id) for one in drawn)
    return Retrieved(found.reflections, found.version, uses)
