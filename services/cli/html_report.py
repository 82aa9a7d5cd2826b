"""`mulligan report`: a run as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mulligan.cli.found_run import found_run
from mulligan.cli.out import fail, note, show, working
from mulligan.common.extras import MissingExtra
from mulligan.common.files import replace

EXPERIENCES = 50


def report(
    run: Annotated[str, typer.Argument(help="A run's folder; or its id, if it is in RUNS or below.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The file; RUN.html here if not given.")] = None,
    count: Annotated[int, typer.Option("--experiences", min=0, help="At most so many.")] = EXPERIENCES,
    tokens: Annotated[bool, typer.Option(help="With each token of them.")] = True,
    runs: Annotated[Path, typer.Option(help="Where runs are looked for by their id.")] = Path("runs"),
) -> None:
    """Write a run as one HTML file with charts, experiences and settings, to mail or to keep. It needs no server.

    Example: `mulligan report runs/demo/runs/demo-1`
    """
    try:
        from mulligan.console.library import Library
        from mulligan.console.report import report as written
    except ImportError as error:
        fail(MissingExtra("ui", error), 2)
    library = Library(found_run(run, runs))
    library.update()
    (shown,) = library.runs
    file = output or Path(f"{shown.key}.html")
    with working(f"reading the run's {shown.series.steps} steps"):
        text = written(shown, count, tokens=tokens)
    try:
        replace(file, text.encode())
    except OSError as error:
        fail(f"--output {file}: {error.strerror}", 2)
    note(f"{len(text.encode()) / 1e6:.1f} MB")
    show(str(file))
