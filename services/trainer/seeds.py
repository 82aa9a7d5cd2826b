"""Seeds and task choices, derived from the run's seed, step, task and rollout. A resumed run makes the same choices."""

from __future__ import annotations

import random
from hashlib import blake2b


def derive_seed(*parts: object) -> int:
    """A seed of 63 bits that depends on every part, e.g. (run seed, step, task, rollout, role, turn)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def in_passes(task_count: int, start: int, count: int, *seed: object) -> list[int]:
    """`count` indices of tasks, from place `start` of a sequence of passes: each pass has every task once, in a new
    random order that depends on the parts of `seed`."""
    chosen: list[int] = []
    while len(chosen) < count:
        epoch, offset = divmod(start + len(chosen), task_count)
        order = list(range(task_count))
        random.Random(derive_seed(*seed, "order", epoch)).shuffle(order)
        chosen.extend(order[offset : offset + count - len(chosen)])
    return chosen
