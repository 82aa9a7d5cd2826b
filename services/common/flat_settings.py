"""Settings of a table that names a plug-in, with the plug-in's own settings beside the common ones:

[loss]
name = "ppo"
kl_coefficient = 0.001
clip_high = 0.28
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from mulligan.common.extras import MissingExtra
from mulligan.common.plugins import Plugins, PluginSettings, UnusablePlugin, located, told_in_place


class FlatSettings(BaseModel):
    """Base class of such a table. A subclass sets `plugins`, and defines `name` and the common settings as fields.

    The plug-in's settings are extra fields, defaults filled in: they are read by the plug-in's `Settings`, dumped with
    the others, and compared. `own` returns them as an instance of it. A name that neither knows is refused with the
    nearest right one.
    """

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)
    plugins: ClassVar[Plugins]
    name: str

    @model_validator(mode="after")
    def _read_own(self) -> Self:
        try:
            settings: type[PluginSettings] = self.plugin.Settings
        except (UnusablePlugin, MissingExtra) as error:
            raise located({("name",): str(error)}) from None
        try:
            own = settings.model_validate(self.model_extra)
        except ValidationError as error:
            owner = f"{self.plugins.noun} {self.name!r}"
            raise told_in_place(error, settings, owner, type(self).model_fields) from None
        object.__setattr__(self, "__pydantic_extra__", dict(own))
        return self

    @property
    def plugin(self) -> Any:
        return _found(self.plugins, self.name)

    @property
    def own(self) -> Any:
        """The settings of the plug-in, an instance of its `Settings`."""
        return self.plugin.Settings.model_construct(**(self.model_extra or {}))


@cache
def _found(plugins: Plugins, name: str) -> Any:
    """As `Plugins.find`, which looks into folders, but once for each name that is found."""
    return plugins.find(name)
