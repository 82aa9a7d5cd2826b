"""Runs the whole test suite ten times in a clean clone of the commit. No test may ever fail."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
RUNS = 10


def ten_runs(folder: Path) -> dict[str, Any]:
    """Each run is recorded in `folder` when it ends. An interrupted case continues with the next run."""
    commit = _git("rev-parse", "HEAD")
    clone = folder / "clone"
    records = folder / commit / "runs.jsonl"
    if not records.exists():
        if folder.exists():
            shutil.rmtree(folder)
        records.parent.mkdir(parents=True)
        _git("clone", "--quiet", str(ROOT), str(clone))
        _git("checkout", "--quiet", commit, folder=clone)
        records.touch()
    runs = [json.loads(line) for line in records.read_text().splitlines()]
    while len(runs) < RUNS:
        runs.append(_run(clone, records.parent / "report.xml"))
        print(f"    run {len(runs)} of {RUNS}: {runs[-1]}", flush=True)
        with records.open("a") as file:
            file.write(json.dumps(runs[-1]) + "\n")
    return {"green": sum(not run["failed"] for run in runs), "runs": runs}


def _run(clone: Path, report: Path) -> dict[str, Any]:
    start = time.monotonic()
    report.unlink(missing_ok=True)
    result = subprocess.run(
        ["make", "tools", "test", f"ARGS=--junit-xml={report.resolve()}"],
        cwd=clone,
        capture_output=True,
        text=True,
        check=False,
    )
    if not report.exists():
        return {"failed": [f"make test ended with {result.returncode}: {result.stderr[-500:]}"]}
    counts = outcomes(report)
    failed = counts["failed"]
    if result.returncode and not failed:
        failed.append(f"make test ended with {result.returncode}")
    return {**counts, "skipped": len(counts["skipped"]), "seconds": round(time.monotonic() - start)}


def outcomes(report: Path) -> dict[str, Any]:
    """Of a report of pytest in JUnit's form: how many tests passed, which were skipped and failed, and why."""
    found: dict[str, Any] = {"passed": 0, "skipped": [], "failed": []}
    for case in ElementTree.parse(report).iter("testcase"):
        children = {child.tag: child for child in case}
        problem = children.get("failure", children.get("error"))
        name = f"{case.get('classname')}.{case.get('name')}"
        if problem is not None:
            found["failed"].append(f"{name}: {problem.get('message', '')[:500]}")
        elif "skipped" in children:
            found["skipped"].append(f"{name}: {children['skipped'].get('message', '')[:200]}")
        else:
            found["passed"] += 1
    return found


def _git(*arguments: str, folder: Path = ROOT) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {"suite": ten_runs}
