"""The versions of a policy on disk, whenever the process dies that writes them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from mulligan.common.inference import VersionState
from mulligan.policy.versions import VersionStore
from tests.support.paths import IMPORT_ROOTS, ROOT

KEEP = 2

_WRITER = """
import hashlib, sys
from pathlib import Path
from tests.support.version_records import record_of, staged
from mulligan.policy.versions import VersionStore

folder = Path(sys.argv[1])
store = VersionStore(folder / "store", 2)
if store.serving() is None:
    store.begin(record_of(0, 0, None))
print("ready", flush=True)
while True:
    number = store.next_version()
    content = str(number).encode() * 50_000
    staged(store, folder, number, content)
    if number % 7 == 3:
        store.refuse(record_of(number, 0, content).now(problem="bad"))
        continue
    store.serve(record_of(number, 0, content))
    print(number, flush=True)
    if number % 5 == 4:
        older = [r for r in store.of_model(0) if r.version.state == "kept"][0]
        store.serve(older, withdrawn="rolled back")
        print(older.number, flush=True)
"""


def test_killed_at_any_moment_it_comes_back_whole(tmp_path: Path) -> None:
    """The version that was acknowledged last serves, or the one that was on its way; and its file is right."""
    seen = 0
    for round_number in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": IMPORT_ROOTS},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        acknowledged = ""
        for _ in range(3 + 2 * round_number):
            acknowledged = process.stdout.readline().strip()
        process.send_signal(signal.SIGKILL)
        lines = [line.strip() for line in process.stdout.read().splitlines()]
        process.wait()
        process.stdout.close()
        acknowledged = lines[-1] if lines else acknowledged
        store = VersionStore(tmp_path / "store", KEEP)
        serving = store.serving()
        assert serving is not None
        states = {version.policy_version: version.state for version in store.versions(None, 1000)}
        assert states[int(acknowledged)] in (VersionState.SERVING, VersionState.KEPT, VersionState.WITHDRAWN)
        assert serving.number >= int(acknowledged) or states[int(acknowledged)] is VersionState.WITHDRAWN
        for number, state in states.items():
            if state in (VersionState.SERVING, VersionState.KEPT):
                record = store.get(number)
                assert record is not None
                store.file(record)
        assert len(states) > seen
        seen = len(states)
        store.close()
