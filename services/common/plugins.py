"""Backends, environments, stores and encoders by name.

A plug-in is a module or a package that exports what its kind needs: its `Settings`, and an `open` or `create`. A name
means, in this order, one that comes along, one that an installed distribution has as an entry point, or any other
module that can be imported, such as `acme.games.chess`.

A module is imported when it is named, and each installed one when the settings of a service are read, so it imports
what is heavy within its functions.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from mulligan.common.extras import MissingExtra
from mulligan.common.suggest import did_you_mean, problems

M = TypeVar("M", bound=BaseModel)
S = TypeVar("S", bound="PluginSettings")


class UnusablePlugin(ValueError):
    """The name means nothing, or something that cannot be used; the message says which, and what there is."""


class PluginSettings(BaseModel):
    """Base of the `Settings` of a plug-in: an unknown one is refused, and none changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, slots=True)
class Plugins:
    """All of one kind. `noun` is what messages call it, `package` holds those that come along, `group` is the group of
    entry points, `exports` are the names that each has to have, of which `Settings` is a subclass of `settings`, where
    there is one. `default` is used where the settings of a service name none."""

    noun: str
    package: str
    group: str
    exports: tuple[str, ...]
    default: str = ""
    settings: type[PluginSettings] | None = None

    @property
    def others(self) -> str:
        """The field of a service's settings for those of a plug-in that has no place there."""
        return f"{self.noun}_settings"

    @property
    def built_in(self) -> tuple[str, ...]:
        """Those that come along, by name. A module whose name begins with an underscore is none."""
        path = importlib.import_module(self.package).__path__
        return tuple(sorted(found.name for found in pkgutil.iter_modules(path) if not found.name.startswith("_")))

    @property
    def names(self) -> tuple[str, ...]:
        """Those that come along, and those that are installed."""
        return tuple(sorted({*self.built_in, *(entry.name for entry in entry_points(group=self.group))}))

    def find(self, name: str) -> Any:
        """The module, or whatever an entry point names. Raises UnusablePlugin."""
        if name in self.built_in:
            return self._complete(name, self._loaded(name, lambda: importlib.import_module(f"{self.package}.{name}")))
        if entry := self._installed(name):
            return self._complete(name, self._loaded(name, entry.load))
        if not _is_module(name):
            raise self.unknown(name)
        return self._complete(name, self._loaded(name, lambda: importlib.import_module(name)))

    def unknown(self, name: str) -> UnusablePlugin:
        names = self.names
        near = did_you_mean(name, names)
        return UnusablePlugin(f"there is no {self.noun} {name!r}{near}; there are {', '.join(names)}")

    def _installed(self, name: str) -> EntryPoint | None:
        found = {entry.value: entry for entry in entry_points(group=self.group, name=name)}
        if len(found) > 1:
            raise UnusablePlugin(f"several distributions have a {self.noun} {name!r}: {', '.join(sorted(found))}")
        return next(iter(found.values()), None)

    def _loaded(self, name: str, load: Callable[[], Any]) -> Any:
        try:
            return load()
        except MissingExtra:
            raise
        except Exception as error:  # a module's own code runs, and may raise anything
            said = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
            raise UnusablePlugin(f"{name!r} is no {self.noun}: {said}") from error

    def _complete(self, name: str, plugin: Any) -> Any:
        missing = [export for export in self.exports if not hasattr(plugin, export)]
        if missing:
            raise UnusablePlugin(f"{name!r} is no {self.noun}: it has no `{missing[0]}`")
        base = self.settings
        if base is not None and not (isinstance(plugin.Settings, type) and issubclass(plugin.Settings, base)):
            raise UnusablePlugin(f"{name!r} is no {self.noun}: its `Settings` is no {base.__name__}")
        return plugin


def _is_module(name: str) -> bool:
    """A dotted name is taken for one; one without a dot is one that is there."""
    if not all(part.isidentifier() for part in name.split(".")):
        return False
    try:
        return "." in name or find_spec(name) is not None
    except ValueError:  # `__main__` has no specification
        return False


def with_tables(plugins: Plugins) -> Callable[[type[M]], type[M]]:
    """Decorates the settings of a service. The settings of the default plug-in stand among them; each other one that
    has any gets a table of its name. One that cannot be imported gets none, and is refused when it is named."""

    def decorate(model: type[M]) -> type[M]:
        default: type[PluginSettings] = plugins.find(plugins.default).Settings
        added: dict[str, Any] = {name: (field.annotation, field) for name, field in default.model_fields.items()}
        for name in plugins.names:
            settings = _settings_of(plugins, name) if name != plugins.default and name.isidentifier() else None
            if settings is not None and settings.model_fields and name not in {*model.model_fields, *added}:
                added[name] = _table(settings)
        extended = create_model(model.__name__, __base__=model, __module__=model.__module__, **added)
        extended.__doc__ = model.__doc__
        return extended

    return decorate


def with_place(model: type[BaseModel], plugins: Plugins) -> tuple[str, ...]:
    """The plug-ins whose settings have a place of their own in a model that `with_tables` extended."""
    return tuple(name for name in plugins.names if name == plugins.default or _is_table(model.model_fields.get(name)))


def place_of(model: type[BaseModel], plugins: Plugins, name: str) -> str:
    """What stands before the names of a plug-in's settings: "" for the default, `name.` for a table, or `others.`,
    the field for those of plug-ins that have no place, such as modules."""
    if name == plugins.default:
        return ""
    return f"{name}." if _is_table(model.model_fields.get(name)) else f"{plugins.others}."


def chosen_settings(model: BaseModel, plugins: Plugins, name: str) -> Any:
    """The settings of the plug-in `name`, of the class that it exports. Raises UnusablePlugin, and
    PydanticCustomError, a ValueError that names the setting."""
    settings = plugins.find(name).Settings
    if name == plugins.default:
        return settings(**{field: getattr(model, field) for field in settings.model_fields})
    table = getattr(model, place_of(type(model), plugins, name).removesuffix("."))
    return table if isinstance(table, settings) else read_table(settings, table or {})


def read_table(settings: type[S], table: Mapping[str, Any]) -> S:
    """Raises PydanticCustomError, a ValueError, with all that is wrong."""
    try:
        return settings.model_validate(dict(table))
    except ValidationError as error:
        found = (f"{name}: {said}" for name, said in problems(error, settings).items())
        raise PydanticCustomError("plugin", "{problems}", {"problems": "; ".join(found)}) from error


def _is_table(field: FieldInfo | None) -> bool:
    """Whether it is one that `_table` made."""
    kinds = (field.annotation, *get_args(field.annotation)) if field is not None else ()
    return any(isinstance(kind, type) and issubclass(kind, PluginSettings) for kind in kinds)


def _settings_of(plugins: Plugins, name: str) -> type[PluginSettings] | None:
    try:
        settings: type[PluginSettings] = plugins.find(name).Settings
    except UnusablePlugin:
        return None
    return settings


def _table(settings: type[PluginSettings]) -> tuple[Any, Any]:
    """Annotation and default of the field. None where a setting has no default."""
    try:
        return settings, settings()
    except ValidationError:
        return settings | None, None
