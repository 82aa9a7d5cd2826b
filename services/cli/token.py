"""`mulligan token`: the credential of a run, for callers that did not start it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mulligan.cli.out import fail, show
from mulligan.common.run_credentials import BadKeys, RunGrant, RunKeys


def token(
    keys: Annotated[
        Path,
        typer.Option(
            envvar="MULLIGAN_CLI_RUN_KEYS",
            help="PEM file with the private key: the trainer's setting `run_keys`.",
            exists=True,
            dir_okay=False,
        ),
    ],
    run: Annotated[str, typer.Option(help="Its learner, and the scope of the memory with its id.")] = "",
    scope: Annotated[list[str] | None, typer.Option(help="A scope of the memory; may be given several times.")] = None,
    hours: Annotated[float, typer.Option(min=0.01, help="How long it counts.")] = 24.0,
) -> None:
    """Print a credential that allows writes to a memory scope, or the use of a learner. Calls carry it as the metadata
    `mulligan-run-credential`, beside the token of their role.

    Example: `mulligan token --keys run-keys.pem --run my-run`
    """
    scopes = tuple(dict.fromkeys([*([run] if run else []), *(scope or [])]))
    if not scopes:
        fail("expected --run RUN, --scope SCOPE, or both", 2)
    try:
        show(RunKeys(keys).sign(RunGrant(run, scopes), hours * 3600))
    except BadKeys as error:
        fail(error, 2)
