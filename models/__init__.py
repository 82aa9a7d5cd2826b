"""Models that come along or can be fetched.

`embedded/` and `embedded_symbols/` are small enough for two CPU cores. They were trained from nothing, by
`mulligan.models.recipe` and `mulligan.models.many_symbols`. `catalog.py` lists the pretrained models that
`mulligan models fetch` fetches.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from mulligan.common.model_files import UnsupportedModel, is_hub_id, short
from mulligan.common.suggest import did_you_mean
from mulligan.models.catalog import CATALOG, default_folder

EMBEDDED = Path(__file__).parent / "embedded"
EMBEDDED_MODELS: Mapping[str, Path] = {"embedded": EMBEDDED, "embedded-symbols": EMBEDDED.parent / "embedded_symbols"}


# Of a repository at the hub: what loaders read, without pickles, which can run code.
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "*.txt"]


def locate(model: str, revision: str = "") -> str:
    """The folder or hub id of what a setting names: a model that comes along, one of the catalogue, a folder or a hub
    id. With a `revision`, a commit or a tag of a hub id, it is the folder that this was downloaded to.

    A folder comes before a model of the catalogue with its name. Raises UnsupportedModel for a model of the catalogue
    that was not fetched; for a name that is nearly one of these, because the hub would be asked for it for a minute;
    for a revision that cannot be had, or of what is no hub id.
    """
    if revision:
        return _downloaded(model, revision)
    if model in EMBEDDED_MODELS:
        return str(EMBEDDED_MODELS[model])
    if "/" in model or os.path.exists(model):
        return model
    if model not in CATALOG:
        if near := did_you_mean(model, (*EMBEDDED_MODELS, *CATALOG)):
            raise UnsupportedModel(f"there is no model or folder {model!r}{near}")
        return model
    folder = default_folder(model)
    if not folder.is_dir():
        raise UnsupportedModel(f"{model} is not in {folder}: fetch it with `mulligan models fetch {model}`")
    return str(folder)


def problem_of_place(source: str, models_folder: Path | None) -> str:
    """Why a caller may not have this model loaded: it is neither a hub id, nor a model that comes along, nor a folder
    below `models_folder`. Empty if the caller may. Symbolic links count as what they lead to."""
    if source in EMBEDDED_MODELS or is_hub_id(source):
        return ""
    if models_folder is None:
        return "this server loads no folders, but hub ids: it has no models_folder"
    root = models_folder.resolve()
    try:
        path = Path(source).resolve()
    except (ValueError, OSError, RuntimeError) as error:
        return str(error)
    return "" if path != root and path.is_relative_to(root) else "neither a hub id nor below the server's models folder"


def _downloaded(model: str, revision: str) -> str:
    if model in EMBEDDED_MODELS or model in CATALOG or not is_hub_id(model):
        raise UnsupportedModel(f"revision {revision!r}: {model} is no model of the hub, and has none")
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(model, revision=revision, allow_patterns=_FILES))
    except (OSError, ValueError) as error:  # all errors of the hub and of HTTP are of these kinds
        raise UnsupportedModel(f"{model} at revision {revision!r} cannot be downloaded: {short(error)}") from error
