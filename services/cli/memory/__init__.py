"""`mulligan memory`: what the reflection memory holds, and what became of it."""

from __future__ import annotations

import typer

from mulligan.cli.memory import changing, consolidation, reading, transfer

memory = typer.Typer(help="Look into the reflection memory, and change what it holds.", no_args_is_help=True)
memory.command("list")(reading.list_reflections)
memory.command()(reading.show)
memory.command()(reading.why)
memory.command()(reading.log)
memory.command()(changing.forget)
memory.command()(changing.erase)
memory.command()(changing.retire)
memory.command()(changing.release)
memory.command()(consolidation.consolidate)
memory.command()(transfer.export)
memory.command("import")(transfer.import_file)
