"""Runs a filter of system calls as the kernel does: classic BPF over `struct seccomp_data`. For architectures other
than the machine's."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from tempfile import TemporaryFile

import pyseccomp

ALLOWED = 0x7FFF0000
KILLED = 0x80000000  # the whole process
_ERRNO = 0x00050000
_LOAD, _AND, _RETURN, _JUMP = 0x20, 0x54, 0x06, 0x05
_EQUAL, _GREATER, _AT_LEAST, _ANY_BIT = 0x15, 0x25, 0x35, 0x45


class BpfProgram:
    def __init__(self, rules: pyseccomp.SyscallFilter) -> None:
        with TemporaryFile() as file:
            rules.export_bpf(file)
            file.seek(0)
            self._instructions = list(struct.iter_unpack("=HBBI", file.read()))

    def run(self, architecture: int, number: int, arguments: Sequence[int] = (0,) * 6) -> int:
        """The action for a call."""
        values = [value & 0xFFFF_FFFF_FFFF_FFFF for value in (*arguments, *(0,) * (6 - len(arguments)))]
        data = struct.pack("<IIQ6Q", number, architecture, 0, *values)
        held = 0
        at = 0
        while True:
            code, if_so, if_not, value = self._instructions[at]
            at += 1
            if code == _LOAD:
                (held,) = struct.unpack_from("<I", data, value)
            elif code == _AND:
                held &= value
            elif code == _RETURN:
                return int(value)
            elif code == _JUMP:
                at += value
            else:
                at += if_so if _holds(code, held, value) else if_not


def _holds(code: int, held: int, value: int) -> bool:
    if code == _EQUAL:
        return held == value
    if code == _GREATER:
        return held > value
    if code == _AT_LEAST:
        return held >= value
    assert code == _ANY_BIT, f"unknown instruction {code:#x}"
    return bool(held & value)


def refused_with(action: int) -> int:
    """The errno of an action, or 0 if it is none."""
    return action & 0xFFFF if action & 0xFFFF0000 == _ERRNO else 0
