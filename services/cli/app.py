"""The commands of `mulligan`. One file per command; each adds itself to the table below."""

from __future__ import annotations

import sys

import structlog
import typer

from services.cli.conformance import conformance
from services.cli.demo import demo
from services.cli.env import env
from services.cli.evaluate import evaluate
from services.cli.experiences import experiences
from services.cli.learners import learners
from services.cli.memory import memory
from services.cli.out import fail
from services.cli.policy import policy
from services.cli.runs import runs
from services.cli.stop import resume, stop
from services.cli.train import train
from services.cli.up import up
from services.cli.watch import watch
from services.common.extras import how_to_install

app = typer.Typer(
    name="mulligan",
    help="Language agents that learn by experience: four gRPC services and the loop that trains on them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for command in (demo, up, train, watch, runs, stop, resume, experiences):
    app.command()(command)
app.command("eval")(evaluate)
app.add_typer(conformance, name="conformance")
app.add_typer(env, name="env")
app.add_typer(learners, name="learners")
app.add_typer(memory, name="memory")
app.add_typer(policy, name="policy")


def run_app() -> None:
    """Errors of the operating system, and packages that are not installed, are one sentence and status 2."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # stdout is for results
    try:
        app()
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("services"):
            raise
        fail(f"{error}: {how_to_install('all')}", 2)
    except OSError as error:
        fail(error, 2)
    except KeyboardInterrupt:
        sys.exit(130)
