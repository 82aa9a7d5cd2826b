"""Environment steps per second: `python -m benchmarks.env [--quick]`, after `make openenv`.

First ours and OpenEnv side by side with 1 to 4,096 concurrent sessions (`versus.py` says how), then the ways to step
our server, from bare Python to the coalescing client (`ways.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.common import print_result, print_table, spread
from benchmarks.env import cores, versus, ways
from benchmarks.openenv import process as openenv


def main() -> None:
    parser = argparse.ArgumentParser(description="Environment steps per second, ours and OpenEnv's.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    quick = parser.parse_args().quick
    try:
        openenv.python()
    except openenv.NotInstalled as error:
        sys.exit(f"error: {error}")
    pinned = cores.choose()
    files = cores.allow_many_files()
    print(f"OpenEnv {openenv.version()}; {pinned}; {files:,} open files at most", file=sys.stderr, flush=True)
    rounds, rounds_of_many = (3, 1) if quick else (9, 3)
    with TemporaryDirectory() as folder:
        found = asyncio.run(versus.compare(Path(folder), pinned, rounds, rounds_of_many))
        print_versus(found)
        with cores.on(pinned.client):
            by_way = ways.run(Path(folder), pinned.server, 5 if quick else 25)
    errors = {side: figures[4096].errors for side, figures in found.items()}
    print_result(
        "env",
        {
            **{f"openenv_ratio_{sessions}": versus.ratio(found, sessions) for sessions in versus.EPISODES},
            "errors_4096": errors[versus.OURS],
            "openenv_errors_4096": errors[versus.OPENENV],
            "openenv_version": openenv.version(),
            "pinned": str(pinned),
            "rounds": [rounds, rounds_of_many],
            "sides": {side: {n: as_json(f) for n, f in figures.items()} for side, figures in found.items()},
            "steps_per_second": by_way,
        },
    )


def as_json(figures: versus.SideFigures) -> dict[str, object]:
    return {
        "steps_per_second": round(figures.steps_per_second),
        "p50_ms": round(figures.p50_ms, 2),
        "p99_ms": round(figures.p99_ms, 2),
        "errors": figures.errors,
        **({"error": figures.error} if figures.error else {}),
    }


def print_versus(found: dict[str, dict[int, versus.SideFigures]]) -> None:
    rows = []
    for sessions in versus.EPISODES:
        for side in (versus.OURS, versus.OPENENV):
            figures = found[side][sessions]
            rows.append(
                [
                    f"{sessions:,}",
                    side,
                    f"{figures.steps_per_second:,.0f}",
                    spread(figures.rates),
                    f"{figures.p50_ms:,.2f}",
                    f"{figures.p99_ms:,.2f}",
                    f"{figures.errors:,}",
                    f"{versus.ratio(found, sessions) or '–'}" if side == versus.OURS else "",
                ]
            )
    print_table(["sessions", "", "steps/s", "least–greatest", "p50 ms", "p99 ms", "errors", "of OpenEnv"], rows)
    print(flush=True)


if __name__ == "__main__":
    main()
