"""Seeds and task choices, derived from the run's seed, step, task and rollout. A resumed run makes the same choices."""

from __future__ import annotations

import random
from hashlib import blake2b


def derive_seed(*parts: object) -> int:
    """A seed of 63 bits that depends on every part, e.g. (run seed, step, task, rollout, role, turn)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def tasks_of_step(task_count: int, tasks_per_step: int, step: int, seed: int) -> list[int]:
    """Indices of a step's tasks. Steps go through all tasks again and again, in a new random order each time."""
    start = step * tasks_per_step
    chosen: list[int] = []
    while len(chosen) < tasks_per_step:
        epoch, offset = divmod(start + len(chosen), task_count)
        order = list(range(task_count))
        random.Random(derive_seed(seed, "order", epoch)).shuffle(order)
        chosen.extend(order[offset : offset + tasks_per_step - len(chosen)])
    return chosen
