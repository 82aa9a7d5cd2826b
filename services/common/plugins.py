"""Finds backends, environments, stores, embedders and encoders by name.

A plug-in is a module or package that exports what its kind needs: `Settings`, and `open` or `create`. A name is looked
up as a built-in plug-in, then as an entry point of an installed distribution, then as any importable module, such as
`acme.games.chess`.

A plug-in is imported when it is named; installed backends, stores and embedders are also imported when the settings of
a service are read. So it imports heavy packages inside its functions.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails, PydanticCustomError

from mulligan.common.extras import MissingExtra
from mulligan.common.number_settings import NumberSettings
from mulligan.common.suggest import WHOLE, did_you_mean, problems

M = TypeVar("M", bound=BaseModel)
S = TypeVar("S", bound="PluginSettings")


class UnusablePlugin(ValueError):
    """No usable plug-in has this name. The message says why, and lists the known names."""


class PluginSettings(NumberSettings):
    """Base class of the `Settings` of plug-ins. Unknown settings are refused; instances are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, slots=True)
class Plugins:
    """The plug-ins of one kind.

    `find` resolves a name and checks that the plug-in has all `exports`; its `Settings` must be a subclass of
    `settings`, if that is given. `noun` is the name of the kind in messages, `package` contains the built-in ones,
    `group` is the entry point group. `default` is the plug-in that is used when the settings of a service name none.
    `reserved` are names that no setting of a plug-in may have, as its contract has other uses for them.
    """

    noun: str
    package: str
    group: str
    exports: tuple[str, ...]
    default: str = ""
    settings: type[PluginSettings] | None = None
    reserved: tuple[str, ...] = ()

    @property
    def others(self) -> str:
        """The setting that holds the settings of a plug-in without a table of its own."""
        return f"{self.noun}_settings"

    @property
    def built_in(self) -> tuple[str, ...]:
        """Names of the built-in plug-ins. Modules with a leading underscore are skipped."""
        return _modules_of(self.package)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the built-in and installed plug-ins."""
        return tuple(sorted({*self.built_in, *(entry.name for entry in entry_points(group=self.group))}))

    def find(self, name: str) -> Any:
        """Returns the module, or the object of an entry point. Raises UnusablePlugin, and MissingExtra for absent
        packages."""
        if name in self.built_in:
            return self._complete(name, self._loaded(name, lambda: importlib.import_module(f"{self.package}.{name}")))
        if entry := self._installed(name):
            return self._complete(name, self._loaded(name, entry.load))
        if not _is_module(name):
            raise self.unknown(name)
        return self._complete(name, self._loaded(name, lambda: importlib.import_module(name)))

    def having(self, setting: str) -> list[str]:
        """The plug-ins with this setting. Those that cannot be imported are left out."""
        tables = {name: _settings_of(self, name) for name in self.names}
        return [name for name, table in tables.items() if table is not None and setting in table.model_fields]

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
        except (Exception, SystemExit) as error:  # importing runs foreign code, which may raise anything
            said = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
            raise UnusablePlugin(f"{name!r} is no {self.noun}: {said}") from error

    def _complete(self, name: str, plugin: Any) -> Any:
        missing = [export for export in self.exports if not hasattr(plugin, export)]
        if missing:
            raise UnusablePlugin(f"{name!r} is no {self.noun}: it has no `{missing[0]}`")
        base = self.settings
        if base is not None and not (isinstance(plugin.Settings, type) and issubclass(plugin.Settings, base)):
            raise UnusablePlugin(f"{name!r} is no {self.noun}: its `Settings` is no {base.__name__}")
        if taken := [field for field in self.reserved if field in plugin.Settings.model_fields]:
            raise UnusablePlugin(f"{name!r} is no {self.noun}: {taken[0]!r} cannot be the name of a setting")
        return plugin


@cache
def _modules_of(package: str) -> tuple[str, ...]:
    """Listed once: names are looked up for every sample of a run."""
    path = importlib.import_module(package).__path__
    return tuple(sorted(found.name for found in pkgutil.iter_modules(path) if not found.name.startswith("_")))


def _is_module(name: str) -> bool:
    """Whether the name may be a module: any dotted name, or an undotted one that exists."""
    if not all(part.isidentifier() for part in name.split(".")):
        return False
    try:
        return "." in name or find_spec(name) is not None
    except ValueError:  # `__main__` has no specification
        return False


def with_tables(plugins: Plugins) -> Callable[[type[M]], type[M]]:
    """Decorates the settings class of a service. Adds the settings of the default plug-in, if there is one, as fields,
    and a table for each other plug-in that has settings. A plug-in that cannot be imported gets no table; it is
    refused when it is named. One whose name means something else in the class gets none either."""

    def decorate(model: type[M]) -> type[M]:
        added: dict[str, Any] = {}
        if plugins.default:
            default: type[PluginSettings] = plugins.find(plugins.default).Settings
            added = {name: (field.annotation, field) for name, field in default.model_fields.items()}
        for name in plugins.names:
            if name == plugins.default or name in added or not _may_be_field(model, name):
                continue
            settings = _settings_of(plugins, name)
            if settings is not None and settings.model_fields:
                added[name] = _table(settings)
        extended = create_model(model.__name__, __base__=model, __module__=model.__module__, **added)
        extended.__doc__ = model.__doc__
        return extended

    return decorate


def with_place(model: type[BaseModel], plugins: Plugins) -> tuple[str, ...]:
    """The plug-ins with fields or a table in a model that `with_tables` extended."""
    return tuple(name for name in plugins.names if name == plugins.default or _is_table(model.model_fields.get(name)))


def place_of(model: type[BaseModel], plugins: Plugins, name: str) -> str:
    """The prefix of a plug-in's settings: "" for the default, `NAME.` for one with a table, else `others.`, such as for
    modules."""
    if name == plugins.default:
        return ""
    return f"{name}." if _is_table(model.model_fields.get(name)) else f"{plugins.others}."


def chosen_settings(model: BaseModel, plugins: Plugins, name: str) -> Any:
    """Returns the settings of plug-in `name` as an instance of its `Settings`. Raises UnusablePlugin, and
    PydanticCustomError, a ValueError that names the setting."""
    settings = plugins.find(name).Settings
    if name == plugins.default:
        return read_table(settings, {field: getattr(model, field) for field in settings.model_fields})
    table = getattr(model, place_of(type(model), plugins, name).removesuffix("."))
    return table if isinstance(table, settings) else read_table(settings, table or {})


def read_named(plugins: Plugins, table: Any, default: str = "") -> Any:
    """Reads a table whose entry `name` chooses a plug-in, for validators of pydantic. What it reads, an instance of the
    plug-in's `Settings`, is also taken as it is. Without `default` a name is required.

    Raises ValidationError whose locations are those of the settings in the table.
    """
    if isinstance(table, PluginSettings):
        return table
    if not isinstance(table, Mapping):
        raise located({(): f"expected a table of settings, its `name` one of {', '.join(plugins.names)}"})
    name = table.get("name", default)
    if not isinstance(name, str) or not name:
        raise located({("name",): f"expected one of {', '.join(plugins.names)}"})
    return read_chosen(plugins, name, {**table, "name": name})


def read_chosen(
    plugins: Plugins, name: str, table: Mapping[str, Any], *, name_at: str = "name", at: tuple[str, ...] = ()
) -> Any:
    """Reads a table as the `Settings` of the plug-in `name`, for validators of pydantic.

    Raises ValidationError: at `name_at` if there is no such plug-in, below `at` for its settings.
    """
    try:
        settings: type[PluginSettings] = plugins.find(name).Settings
    except (UnusablePlugin, MissingExtra) as error:
        raise located({(name_at,): str(error)}) from error
    try:
        return settings.model_validate(dict(table))
    except ValidationError as error:
        found = problems(error, settings, f"{plugins.noun} {name!r}", plugins.having)
        said = {(*at, *(() if field == WHOLE else field.split("."))): text for field, text in found.items()}
        raise located(said) from error


def located(said: Mapping[tuple[str, ...], str]) -> ValidationError:
    """An error for a validator of pydantic to raise: what is wrong, by the place in the table that it reads."""
    return ValidationError.from_exception_data(
        "settings",
        [
            InitErrorDetails(type=PydanticCustomError("plugin", "{problem}", {"problem": text}), loc=place, input=None)
            for place, text in said.items()
        ],
    )


def read_table(settings: type[S], table: Mapping[str, Any]) -> S:
    """Reads a table into `settings`. Raises PydanticCustomError, a ValueError that lists all problems."""
    try:
        return settings.model_validate(dict(table))
    except ValidationError as error:
        found = (f"{name}: {said}" for name, said in problems(error, settings).items())
        raise PydanticCustomError("plugin", "{problems}", {"problems": "; ".join(found)}) from error


def _is_table(field: FieldInfo | None) -> bool:
    """Whether `_table` made the field."""
    kinds = (field.annotation, *get_args(field.annotation)) if field is not None else ()
    return any(isinstance(kind, type) and issubclass(kind, PluginSettings) for kind in kinds)


def _may_be_field(model: type[BaseModel], name: str) -> bool:
    """Whether pydantic takes the name for a further field, which then replaces nothing in the class."""
    usable = name.isidentifier() and not name.startswith("_")
    return usable and name not in model.model_fields and not hasattr(model, name)


def _settings_of(plugins: Plugins, name: str) -> type[PluginSettings] | None:
    try:
        settings: type[PluginSettings] = plugins.find(name).Settings
    except (UnusablePlugin, MissingExtra):
        return None
    return settings


def _table(settings: type[PluginSettings]) -> tuple[Any, Any]:
    """The annotation and default of a table field. The default is None if a setting is required."""
    try:
        return settings, settings()
    except ValidationError:
        return settings | None, None
