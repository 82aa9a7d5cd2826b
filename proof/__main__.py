"""`python -m proof [--only PREFIX]`: runs the cases that have no result yet, one after the other.

The result of a case is `docs/proof/CASE.json`: its measurements, the commit, and the command to repeat it. After an
interruption, it continues with the first case without a result. To repeat a case, delete its file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from proof import CaseUnavailable, agreement, docker, faults, kills, learning, methods, sglang, suite

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "proof"
CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    **learning.CASES,
    **methods.CASES,
    **kills.CASES,
    **docker.CASES,
    **agreement.CASES,
    **sglang.CASES,
    **faults.CASES,
    **suite.CASES,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--list", action="store_true", help="name the cases and whether they have a result")
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    chosen = [name for name in CASES if name.startswith(arguments.only)]
    if not chosen:
        sys.exit(f"no case begins with {arguments.only!r}")
    for number, name in enumerate(chosen, 1):
        file = RESULTS / f"{name}.json"
        if arguments.list or file.exists():
            print(f"[{number}/{len(chosen)}] {name}: {'done' if file.exists() else 'open'}")
            continue
        print(f"[{number}/{len(chosen)}] {name} …", flush=True)
        start = time.monotonic()
        try:
            measured = CASES[name](ROOT / "runs" / "proof" / name)
        except CaseUnavailable as lacking:
            print(f"    not possible here: {lacking}")
            continue
        result = {"case": name, **measured, **_circumstances(name), "seconds": round(time.monotonic() - start)}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=2) + "\n")
        print(json.dumps(measured))


def _circumstances(name: str) -> dict[str, Any]:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = bool(git("status", "--porcelain", "--untracked-files=no"))
    return {
        "commit": git("rev-parse", "HEAD") + (" with changes" if changed else ""),
        "command": f"python -m proof --only {name}",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "cores": os.cpu_count(),
    }


if __name__ == "__main__":
    main()
