"""The commands of `mulligan`. One file per command; each adds itself to the table below."""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import structlog
import typer

from mulligan.cli.conformance import conformance
from mulligan.cli.connection import INSECURE
from mulligan.cli.demo import demo
from mulligan.cli.doctor import doctor
from mulligan.cli.env import env
from mulligan.cli.evaluate import evaluate
from mulligan.cli.experiences import experiences
from mulligan.cli.export import export
from mulligan.cli.html_report import report
from mulligan.cli.learners import learners
from mulligan.cli.memory import memory
from mulligan.cli.models import models
from mulligan.cli.out import fail, show
from mulligan.cli.policy import policy
from mulligan.cli.runs import runs
from mulligan.cli.stop import resume, stop
from mulligan.cli.token import token
from mulligan.cli.train import train
from mulligan.cli.ui import ui
from mulligan.cli.up import up
from mulligan.cli.watch import watch
from mulligan.common.extras import how_to_install
from mulligan.common.files import keep_files_private

app = typer.Typer(
    name="mulligan",
    help="Language agents that learn by experience: four gRPC services and the loop that trains on them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for command in (demo, up, doctor, train, watch, runs, stop, resume, experiences, export, report, ui, token):
    app.command()(command)
app.command("eval")(evaluate)


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []})
def certs(context: typer.Context) -> None:
    """Make or renew a private authority and certificates for TLS: `mulligan certs FOLDER`."""
    from mulligan.common.certs import main  # images without `mulligan` have it, too

    main(context.args, "mulligan certs")


app.add_typer(conformance, name="conformance")
app.add_typer(env, name="env")
app.add_typer(learners, name="learners")
app.add_typer(memory, name="memory")
app.add_typer(models, name="models")
app.add_typer(policy, name="policy")

# A package of one's own; models that everybody can download; `certs` gives each file its mode.
_MAKES_PUBLIC_FILES = ("certs", "env", "models")


def _print_version(asked: bool) -> None:
    if not asked:
        return
    try:
        show(f"mulligan {version('mulligan')}")
    except PackageNotFoundError:
        fail("mulligan is not installed here, so its version is not known: pip install -e .", 2)
    raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    asked: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", envvar=INSECURE, help="Send tokens to other machines without TLS."),
    ] = False,
) -> None:
    """Options of `mulligan` itself, before a command."""
    if context.invoked_subcommand not in _MAKES_PUBLIC_FILES:
        keep_files_private()  # runs, reports, exports, copies of memories, logs, caches: they have the texts of runs
    if insecure:
        os.environ[INSECURE] = "1"


def run_app() -> None:
    """Runs a command. Errors of the operating system and missing packages are one sentence, with status 2."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # stdout is for results
    try:
        app(prog_name="mulligan")  # completion is for this name, also of `python -m mulligan.cli`
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("mulligan"):
            raise
        fail(f"{error}: {how_to_install('all')}", 2)
    except OSError as error:
        fail(error, 2)
    except KeyboardInterrupt:
        sys.exit(130)
