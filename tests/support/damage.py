"""What happens to the bytes of a file: its end is cut off, bytes are changed, or bytes are missing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from hypothesis import strategies as st


@dataclass(frozen=True)
class Damage:
    """Of the bytes `begin` to `end`: they are missing, or `change` (1 to 255) was added to each."""

    begin: int
    end: int
    change: int = 0

    def of(self, content: bytes) -> bytes:
        changed = bytes((byte + self.change) % 256 for byte in content[self.begin : self.end]) if self.change else b""
        return content[: self.begin] + changed + content[self.end :]

    def touches(self, begin: int, end: int) -> bool:
        return self.begin < end and begin < self.end


@st.composite
def damages(draw: st.DrawFn, size: int) -> Damage:
    """One place in a file of this size, which has at least one byte."""
    begin = draw(st.integers(0, size - 1))
    length = draw(st.one_of(st.integers(1, 40), st.just(size)))
    return Damage(begin, min(size, begin + length), draw(st.sampled_from([0, 0, 1, 2, 32, 128, 255])))


def flips(content: bytes, count: int, seed: int = 7) -> Iterator[tuple[int, bytes]]:
    """Some of the contents that differ in one bit, with the byte where they do. Most of a database's file is zeros, so
    three of four change a byte that is none."""
    draw = random.Random(seed)
    used = [place for place, byte in enumerate(content) if byte]
    for number in range(count):
        place = draw.choice(used) if number % 4 else draw.randrange(len(content))
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.randrange(8)
        yield place, bytes(flipped)
