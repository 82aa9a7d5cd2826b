"""`python -m mulligan.testing.judge.launch [OPTIONS] SERVICE …`: starts `python -m mulligan.SERVICE …` with what tests
and proofs add to it. The services themselves know nothing of it.

--history SOCKET --caller NAME   records the calls that it makes, for the `Collector` at the socket
--synced COPIES FOLDER           copies what is synced in the folder to the folder COPIES (`disks.py`); may be repeated
--credential-seconds N           what the trainer signs for a call of its own run counts for so long
--plugin MODULE:NAME             calls MODULE.NAME(setattr), which may plant a bug; may be repeated
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from mulligan.testing.judge import disks, recorder

SERVICES = ("env", "policy", "memory", "trainer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--history", type=Path)
    parser.add_argument("--caller", default="")
    parser.add_argument("--synced", type=Path, nargs=2, action="append", default=[])
    parser.add_argument("--credential-seconds", type=float)
    parser.add_argument("--plugin", action="append", default=[])
    parser.add_argument("service", choices=SERVICES)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    chosen = parser.parse_args()
    if chosen.history is not None:
        recorder.record_calls(
            recorder.CallRecorder(recorder.to_socket(chosen.history), chosen.caller or chosen.service)
        )
    for copies, folder in chosen.synced:
        disks.copy_what_is_synced(copies, folder)
    if chosen.credential_seconds is not None:
        importlib.import_module("mulligan.trainer.config").OWN_SECONDS = chosen.credential_seconds  # type: ignore[attr-defined]
    for plugin in chosen.plugin:
        module, _, name = plugin.partition(":")
        getattr(importlib.import_module(module), name)(setattr)
    sys.argv = [f"mulligan.{chosen.service}", *chosen.arguments]
    importlib.import_module(f"mulligan.{chosen.service}.__main__").main()


if __name__ == "__main__":
    main()
