"""`python -m proof [--only PREFIX] [--core CORE]`: runs the cases that have no result yet, one after the other.

The result of a case is `docs/proof/CASE.json`: its measurements, the commit, and the command to repeat it. After an
interruption, it continues with the first case without a result. To repeat a case, delete its file. Several processes
may share the cases: none takes one that another is running.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mulligan.common.file_lock import lock_file
from mulligan.common.files import replace
from proof import (
    CaseUnavailable,
    adapters,
    agreement,
    consolidation,
    docker,
    embedded,
    faults,
    faults_judge,
    fuzz,
    kills,
    language_model,
    memory,
    memory_crashes,
    methods,
    predictions,
    second_attempts,
    security,
    sglang,
    soak,
    staleness,
    suite,
)

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "proof"
CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    **methods.CASES,
    **second_attempts.CASES,
    **predictions.CASES,
    **staleness.CASES,
    **kills.CASES,
    **docker.CASES,
    **agreement.CASES,
    **sglang.CASES,
    **adapters.CASES,
    **faults.CASES,
    **faults_judge.CASES,
    **fuzz.CASES,
    **memory.CASES,
    **memory_crashes.CASES,
    **embedded.CASES,
    **language_model.CASES,
    **consolidation.CASES,
    **soak.CASES,
    **security.CASES,
    **suite.CASES,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--list", action="store_true", help="name the cases and whether they have a result")
    parser.add_argument("--core", type=int, help="run them on this core alone")
    arguments = parser.parse_args()
    if arguments.core is not None:
        os.sched_setaffinity(0, {arguments.core})
    RESULTS.mkdir(parents=True, exist_ok=True)
    chosen = [name for name in CASES if name.startswith(arguments.only)]
    if not chosen:
        sys.exit(f"no case begins with {arguments.only!r}")
    if arguments.list:
        for name in chosen:
            print(f"{name}: {'done' if _file(name).exists() else 'open'}")
        return
    lacking = run_all(chosen)
    for name, reason in lacking.items():
        print(f"{name}: {reason}")
    if any(reason.startswith("failed") for reason in lacking.values()):
        sys.exit(1)


def run_all(names: Sequence[str]) -> dict[str, str]:
    """Runs the cases without a result. Returns why those that are left have none.

    A case may need the result of another one, so the list is gone through until nothing can be run any more.
    """
    failed: dict[str, str] = {}
    lacking: dict[str, str] = {}
    while todo := [name for name in names if not _file(name).exists() and name not in failed]:
        lacking = {}
        for name in todo:
            try:
                _run(name, f"[{names.index(name) + 1}/{len(names)}] {name}")
            except CaseUnavailable as reason:
                lacking[name] = f"not possible here: {reason}"
            except subprocess.CalledProcessError as error:
                failed[name] = f"failed: {error}"
        if len(lacking) == len(todo):
            break
    return failed | {name: reason for name, reason in lacking.items() if not _file(name).exists()}


def _run(name: str, title: str) -> None:
    """Runs one case and writes its result, unless another process has done so or is doing so."""
    folder = ROOT / "runs" / "proof" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = lock_file(folder.with_name(folder.name + ".lock"))
    except BlockingIOError:
        raise CaseUnavailable("another process is running it") from None
    with lock:
        if _file(name).exists():
            return
        print(f"{title} …", flush=True)
        start = time.monotonic()
        measured = CASES[name](folder)
        result = {"case": name, **measured, **_circumstances(name), "seconds": round(time.monotonic() - start)}
        _file(name).parent.mkdir(parents=True, exist_ok=True)
        replace(_file(name), (json.dumps(result, indent=2) + "\n").encode())
        print(json.dumps(measured), flush=True)


def _file(name: str) -> Path:
    return RESULTS / f"{name}.json"


def _circumstances(name: str) -> dict[str, Any]:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    results = f":(exclude){RESULTS.relative_to(ROOT)}"  # of other cases, and of those that are to be repeated
    changed = bool(git("status", "--porcelain", "--untracked-files=no", "--", ".", results))
    return {
        "commit": git("rev-parse", "HEAD") + (" with changes" if changed else ""),
        "command": f"python -m proof --only {name}",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "cores": len(os.sched_getaffinity(0)),
    }


if __name__ == "__main__":
    main()
