"""The cache of keys and values."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from mulligan.policy.backends.transformers.attention import LayerShape, SlotCache

MIB = 2**20


def resident() -> int:
    """Bytes of memory that this process takes up (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slot_takes_up_memory_once_it_is_written(dtype: torch.dtype) -> None:
    layers = {0: LayerShape(4, 64, 64, None)}
    size = SlotCache.bytes_per_token(layers, dtype) * MIB // 256 * 64
    before = resident()
    cache = SlotCache(layers, 64, MIB // 256, dtype, torch.device("cpu"))
    assert size >= 256 * MIB and resident() - before < size // 8
    assert not cache.keys[0][7].any() and resident() - before < size // 8
    cache.keys[0][3] = 1.0
    cache.copy_prefix(3, 5, 2)
    assert cache.keys[0][3].all() and cache.keys[0][5, :, :2].all() and not cache.keys[0][5, :, 2:].any()
    assert resident() - before < size // 4
    slot = size // 64 // 2  # its keys
    for begin in (0, 1024):  # of 4096 tokens
        cache.keys[0][3] = 2.0
        held = resident()
        cache.clear(3, begin)
        assert held - resident() > slot * 0.7
        assert (cache.keys[0][3, :, :begin] == 2).all() and not cache.keys[0][3, :, begin:].any()
    del cache
    assert resident() - before < size // 8


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
def test_its_pages_are_small_ones() -> None:
    """A huge page would take up memory for the whole context of a head once a token is written."""
    cache = SlotCache({0: LayerShape(1, 64, 64, None)}, 4, 4 * MIB, torch.float32, torch.device("cpu"))
    place = cache.keys[0].data_ptr()
    flags = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        begin, _, rest = line.partition(" ")[0].partition("-")
        if rest and all(character in "0123456789abcdef" for character in begin + rest):
            here = int(begin, 16) <= place < int(rest, 16)
        elif line.startswith("VmFlags:") and here:
            flags = line
    assert " nh" in flags
