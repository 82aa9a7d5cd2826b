"""How fast the console answers: `python -m benchmarks.console [--quick] [--live SECONDS] [--folder FOLDER]`.

50 runs have 2,000 training steps of 40 metrics each; one of them has 100,000 experiences in its journal, three of four
with a reflection and a second attempt. `mulligan ui` is a process of its own, asked over HTTP from this one.

- `first_page_ms`: the page of a run with its charts and the points that they show.
- `filter_ms`: a page of experiences by each sort of filter: words that few and that most experiences have, the first
  letter of one, reward, role, outcome, environment, step, and several of them. The slowest sort counts: its median, its
  90th percentile, and the processor time that the console takes for it.
- `update_bytes`: what an open page gets when a step of a run ends.
- `live`: for `--live` seconds a page stays open while a run goes on, a step a second; the process's memory before and
  after.

SQLite's own search for the words is measured in the same rounds: a filter by words cannot be faster.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import shutil
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import quote

from benchmarks.common import median, percentile, print_result, print_table
from mulligan.testing.recorded_runs import SETTINGS, write_events, write_step
from mulligan.trainer.events import EvaluationEvent, Event, EventLog, StepEvent
from mulligan.trainer.folder import RunFolder
from mulligan.trainer.settings import RunSettings

RUNS, STEPS, METRICS = 50, 2_000, 40
EXPERIENCES, GROUPS, ROLLOUTS = 100_000, 16, 4  # groups of a step, rollouts of a group
FILTERS = {
    "a word that 8 % have": "text=number7",
    "a word that 75 % have": "text=legend",
    "four words that 75 % have": "text=legend+of+the+letters",
    "the first letter of a word": "text=l",
    "reward": "from=0&to=0",
    "role": "role=second",
    "outcome": "outcome=completed",
    "environment": "environment=frozenlake-3x3",
    "step": "step=100",
    "reward, role and a word": "from=0&to=0&role=second&text=number7",
    "a role that none has": "role=nobody",
}
Times = dict[str, list[tuple[float, float]]]  # ms of wall time and of the console's processor time
AIMS = {"first_page_ms": 300.0, "filter_ms": 100.0, "update_bytes": 20_000.0}
BUSY = "run-00"  # has the experiences
FIRST = "first page: charts of a run and their points"
FILTER = "filter by"


def names() -> list[str]:
    watched = ["success_first", "success_second", "reward_first", "reward_second", "groups_with_signal", "entropy"]
    watched += ["grad_norm", "sampled_tokens", "seconds", "sample_seconds", "learn_seconds", "excluded", "restarts"]
    return watched + [f"branch/number_{number}" for number in range(METRICS - len(watched))]


def make(root: Path, runs: int, steps: int, experiences: int) -> None:
    """Writes what is missing."""
    for number in range(runs):
        folder = RunFolder(root / f"run-{number:02}")
        if not folder.exists:
            folder.create(folder.path.name, RunSettings.model_validate({**SETTINGS, "steps": steps}))
            events: list[Event] = [EvaluationEvent(0, 0.3, 0.3, 100, 0)]
            for step in range(steps):
                metrics = {name: (step * (place + 1) % 997) / 997 for place, name in enumerate(names())}
                events.append(StepEvent(step, metrics))
            write_events(folder, events)
            print(f"  {number + 1} of {runs} runs", flush=True)
    folder = RunFolder(root / BUSY)
    for step in range(experiences // (GROUPS * ROLLOUTS)):
        if not (folder.journal / f"{step:06}.msgpack").exists():
            says = f"legend number{step % 100} of the letters"
            write_step(folder, BUSY, step, groups=GROUPS, rollouts=ROLLOUTS, says=says)
            if step % 200 == 0:
                print(f"  {step * GROUPS * ROLLOUTS:,} of {experiences:,} experiences", flush=True)


class Console:
    """A running console. `get` answers with the body and the milliseconds until it was there."""

    def __init__(self, address: str, process: subprocess.Popen[str]) -> None:
        self._address = address
        self._process = process

    def get(self, path: str) -> tuple[bytes, float]:
        begun = time.perf_counter()
        connection = http.client.HTTPConnection(self._address, timeout=120)
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status}")
        return body, (time.perf_counter() - begun) * 1e3

    def page_with_points(self, path: str) -> float:
        """A page with charts, and what it asks for then, in ms."""
        body, first = self.get(path)
        charts = re.findall(rb'data-metrics="([^"]*)"', body)
        found = {one for chart in charts for one in json.loads(chart.replace(b"&#34;", b'"'))}
        _, points = self.get(f"/series?run={BUSY}" + "".join(f"&metric={quote(one)}" for one in sorted(found)))
        return first + points

    def live(self, after: int) -> Iterator[bytes]:
        """The messages of an open page of charts."""
        connection = http.client.HTTPConnection(self._address, timeout=120)
        query = "".join(f"&metric={quote(one)}" for one in names())
        connection.request("GET", f"/live?run={BUSY}&after={after}{query}")
        answer = connection.getresponse()
        try:
            yield from (line for line in iter(answer.readline, b"") if line.startswith(b"data:"))
        finally:
            connection.close()

    @property
    def processor_seconds(self) -> float:
        """That the process has taken."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def memory(self) -> float:
        """Of the process, in MB."""
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@contextmanager
def console(root: Path, cache: Path) -> Iterator[Console]:
    command = [sys.executable, "-m", "mulligan.cli", "ui", str(root), "--port", "0"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            found = next(match for line in process.stderr if (match := re.search(r"http://(\S+)", line)))
            yield Console(found[1], process)
        finally:
            process.terminate()
            process.wait()


def wait_until_read(shown: Console) -> float:
    """Seconds until all experiences are indexed."""
    begun = told = time.monotonic()
    while b"reading the experiences" in shown.get("/")[0]:
        time.sleep(0.2)
        if time.monotonic() - told > 5:
            told = time.monotonic()
            print("  the console reads the experiences", flush=True)
    return time.monotonic() - begun


def measure(shown: Console, cache: Path, rounds: int) -> Times:
    (index,) = cache.glob("mulligan/console/*.sqlite")
    database = sqlite3.connect(f"file:{index}?mode=ro", uri=True)

    def alone() -> float:
        begun = time.perf_counter()
        database.execute("SELECT count(*) FROM words WHERE words MATCH ?", ('"legend"*',)).fetchone()
        return (time.perf_counter() - begun) * 1e3

    begin = f"/runs/{BUSY}/experiences"
    ways: dict[str, Callable[[], float]] = {
        "runs": lambda: shown.get("/")[1],
        FIRST: lambda: shown.page_with_points(f"/runs/{BUSY}"),
        "experiences": lambda: shown.get(begin)[1],
        **{f"{FILTER} {name}": partial(_filtered, shown, f"{begin}?{query}") for name, query in FILTERS.items()},
        "an experience": lambda: shown.get(f"{begin}/{BUSY}-s3-t1-r1")[1],
        "SQLite's own search for the common word": alone,
    }
    times: Times = {name: [] for name in ways}
    for number in range(-1, rounds):
        for name, way in ways.items():
            before = shown.processor_seconds
            taken = way()
            if number >= 0:
                times[name].append((taken, (shown.processor_seconds - before) * 1e3))
    return times


def _filtered(shown: Console, path: str) -> float:
    return shown.get(path)[1]


def update(shown: Console, root: Path) -> int:
    """Bytes of the message that a page gets when a step ends."""
    log = EventLog(RunFolder(root / BUSY).events_file)
    messages = shown.live(log.entries[-1].number)
    step = len(log.steps())
    log.add(StepEvent(step, dict.fromkeys(names(), step / 7)))
    size = len(next(messages))
    messages.close()  # type: ignore[attr-defined]  # a generator
    return size


def watch(shown: Console, root: Path, seconds: int) -> tuple[float, float]:
    """The process's memory in MB after a tenth of the time, and at its end. A page is open, and a step ends each
    second."""
    log = EventLog(RunFolder(root / BUSY).events_file)
    messages = shown.live(log.entries[-1].number)
    before = shown.memory
    for second in range(seconds):
        step = len(log.steps())
        log.add(StepEvent(step, dict.fromkeys(names(), step / 7)))
        next(messages)
        shown.get(f"/runs/{BUSY}/experiences?text=number{second % 100}")
        if second == seconds // 10:
            before = shown.memory
        if second % 30 == 29:
            print(f"  {second + 1} of {seconds} s: {shown.memory:.1f} MB", flush=True)
    return before, shown.memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 runs, 200 steps, 6,400 experiences")
    parser.add_argument("--live", type=int, default=30, help="seconds to follow a run")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/benchmarks/console"), help="of the runs and the index"
    )
    arguments = parser.parse_args()
    sizes = (5, 200, 6_400) if arguments.quick else (RUNS, STEPS, EXPERIENCES)
    folder = arguments.folder.absolute()  # a relative cache is none
    root, cache = folder / "x".join(map(str, sizes)), folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    make(root, *sizes)
    with console(root, cache) as shown:
        indexed = wait_until_read(shown)
        times = measure(shown, cache, 5 if arguments.quick else 15)
        size = update(shown, root)
        before, after = watch(shown, root, arguments.live)
    rows = []
    for name, found in times.items():
        wall, busy = zip(*found, strict=True)
        numbers = (median(wall), percentile(wall, 90), percentile(wall, 100), statistics.fmean(busy))
        rows.append([name, *(f"{number:.1f}" for number in numbers)])
    print_table(["answer", "median ms", "p90", "greatest", "processor ms, mean"], rows)
    print(f"\n{sizes[2]:,} experiences indexed in {indexed:.0f} s; an update has {size:,} bytes")
    print(f"memory, {arguments.live} s of a run that goes on: {before:.1f} → {after:.1f} MB")
    filters = [list(zip(*found, strict=True)) for name, found in times.items() if name.startswith(FILTER)]
    values: dict[str, object] = {
        "first_page_ms": round(median([wall for wall, _ in times[FIRST]]), 1),
        "filter_ms": round(max(median(wall) for wall, _ in filters), 1),
        "filter_p90_ms": round(max(percentile(wall, 90) for wall, _ in filters), 1),
        "filter_processor_ms": round(max(statistics.fmean(busy) for _, busy in filters), 1),
        "update_bytes": size,
    }
    live = {"seconds": arguments.live, "memory_before_mb": round(before, 1), "memory_after_mb": round(after, 1)}
    print_result("console", {**values, "index_seconds": round(indexed, 1), "live": live, "aims": AIMS})


if __name__ == "__main__":
    main()
