"""The draw that decides which retrieved entry is left out of an attempt, so that its uplift can be measured
(`evidence.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256


def draw(seed: int, key: str, entry_ids: Sequence[str], holdout: float) -> int | None:
    """Index of the entry that is left out; None if all are shown. With probability `holdout` one is left out, each of
    the k entries with probability holdout / k.

    The answer depends on the arguments alone, and is the same on every machine: it is made from their SHA-256. Draws of
    other seeds, other keys (one for each attempt) or other entries are independent of it. Raises ValueError for a
    `holdout` outside of 0 to 1."""
    if not 0 <= holdout <= 1:
        raise ValueError(f"holdout {holdout}, not a number from 0 to 1")
    digest = sha256()
    for part in (str(seed), key, *entry_ids):
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)  # with its length, no part can be taken for two
    chance, choice = (int.from_bytes(digest.digest()[start : start + 8], "little") for start in (0, 8))
    if not entry_ids or (chance >> 11) / 2**53 >= holdout:  # 53 bits: exactly a float, from 0 to below 1
        return None
    return choice * len(entry_ids) >> 64
