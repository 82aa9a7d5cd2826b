"""Models that come along or can be fetched.

`embedded/` is small enough for two CPU cores; it was trained from nothing by `mulligan.models.recipe`. `catalog.py`
lists the pretrained models that `mulligan models fetch` fetches.
"""

from pathlib import Path

from mulligan.common.model_files import UnsupportedModel
from mulligan.common.suggest import did_you_mean
from mulligan.models.catalog import CATALOG, default_folder

EMBEDDED = Path(__file__).parent / "embedded"


def locate(model: str) -> str:
    """The folder or hub id of what a setting names: `embedded`, a model of the catalogue, a folder or a hub id.

    A folder comes before a model of the catalogue with its name. Raises UnsupportedModel for a model of the catalogue
    that was not fetched, and for a name that is nearly one of these: the hub would be asked for it for a minute.
    """
    if model == "embedded":
        return str(EMBEDDED)
    if "/" in model or Path(model).exists():
        return model
    if model not in CATALOG:
        if near := did_you_mean(model, ("embedded", *CATALOG)):
            raise UnsupportedModel(f"there is no model or folder {model!r}{near}")
        return model
    folder = default_folder(model)
    if not folder.is_dir():
        raise UnsupportedModel(f"{model} is not in {folder}: fetch it with `mulligan models fetch {model}`")
    return str(folder)
