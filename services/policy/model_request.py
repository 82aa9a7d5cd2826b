"""What LoadModel asks for: settings of a policy, checked before anything is loaded, and kept over a restart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mulligan import models
from mulligan.common.errors import DomainError, Reason
from mulligan.common.plugins import UnusablePlugin, place_of, with_place
from mulligan.common.state_files import read_document, write_document
from mulligan.common.suggest import problems
from mulligan.common.text import bounded
from mulligan.policy.backend import BackendSettings
from mulligan.policy.backends import BACKENDS
from mulligan.policy.config import PolicyModelSettings
from mulligan.policy.model_settings import ModelSettings

_SHOWN = 200  # characters of an address in a message
_ADVICE = "It names the model that LoadModel loaded: remove the file, and the policy has its own model again."
# The settings of which the digest was made in 0.1.0, besides the tables of other backends.
_FIRST_SETTINGS = {
    *("backend", "model", "frozen", "adapters", "context_length", "max_queue", "device", "dtype", "threads"),
    *("deterministic", "max_batch", "slots", "cache_gib", "tokens_per_pass", "batch_wait_ms"),
}


class ModelRequest(BaseModel):
    """A LoadModel request, as it is kept. `own` is the digest of the policy's own settings at that time."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    backend: str = ""
    options: dict[str, str] = {}
    own: str = ""

    @classmethod
    def read(cls, path: Path) -> ModelRequest | None:
        """None where there is no file. Raises OSError, also for one that is damaged."""
        try:
            return cls.model_validate(read_document(path, dict[str, Any], _ADVICE))
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise OSError(f"{path} is damaged: {error.errors()[0]['msg']}. {_ADVICE}") from error
        except DomainError as error:
            raise OSError(error.message) from error

    def over(self, own: ModelSettings | None) -> ModelRequest | None:
        """The request with the digest of today. None if the policy's own settings changed since it came."""
        digest = settings_digest(own)
        if self.own not in (digest, _first_digest(own)):
            return None
        return self.model_copy(update={"own": digest})

    def write(self, path: Path) -> None:
        """Atomically. Options may hold a credential, so nobody else may read it. Raises DomainError DISK_FULL."""
        write_document(path, self.model_dump(mode="json"), mode=0o600)

    def settings(self, own: ModelSettings | None) -> PolicyModelSettings:
        """The request put over the policy's own settings. Raises DomainError INVALID_SETTING."""
        own = own or PolicyModelSettings()
        backend = self.backend or own.backend
        try:
            if backend not in (own.backend, *BACKENDS.names):  # a module runs code: only the server's settings name one
                raise BACKENDS.unknown(backend)
            places = _places(backend)
        except UnusablePlugin as error:
            raise _invalid("backend", str(error)) from error
        merged = own.model_dump()
        if backend != own.backend:
            merged[BACKENDS.others] = {}  # they are of the policy's own backend
        for name, text in sorted(self.options.items()):  # `adapters` comes before `adapters.small`
            _put(merged, name, text, places)
        for name in _credentials_of_others(self.options, places):
            _set(merged, name, None)
        for place, kind in places.items():
            if "insecure" in kind.model_fields and any(f"{place}{name}" in self.options for name in kind.credentials):
                _set(merged, f"{place}insecure", False)  # it is for the addresses that it was given with
        merged |= {"model": self.model, "backend": backend}
        if self.model != own.model and "revision" not in self.options:
            merged["revision"] = ""  # it is one of the policy's own model
        try:
            return PolicyModelSettings.model_validate(merged)
        except ValidationError as error:
            raise _invalid(*next(iter(problems(error, PolicyModelSettings).items()))) from error


def settings_digest(own: ModelSettings | None) -> str:
    """Of a policy's own settings, without credentials; "" if it has none."""
    if own is None:
        return ""
    # Without what is as it is by default: a backend that is installed later adds a table.
    content = model_settings(own).model_dump(mode="json", exclude_defaults=True)
    if BACKENDS.others in content:  # as the backend reads them: it alone knows which are credentials
        content[BACKENDS.others] = own.own.model_dump(mode="json", exclude_defaults=True)
    return _digest(content)


def _first_digest(own: ModelSettings | None) -> str:
    """As `settings_digest` of 0.1.0, which left nothing out: what was loaded then is still there after an upgrade."""
    if own is None:
        return ""
    kinds = {name: BACKENDS.find(name).Settings for name in with_place(PolicyModelSettings, BACKENDS)}
    tables = {name: kind.after_0_1_0 for name, kind in kinds.items() if kind.in_0_1_0}
    content = model_settings(own).model_dump(mode="json", include=_FIRST_SETTINGS | set(tables), exclude=tables)
    return _digest(content)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def model_settings(settings: ModelSettings) -> PolicyModelSettings:
    """Those of the model alone, without the settings of the service."""
    return PolicyModelSettings(**{name: getattr(settings, name) for name in PolicyModelSettings.model_fields})


def servers_of(settings: ModelSettings) -> dict[str, str]:
    """Addresses of servers that hold the policy's weights or adapters, and the setting that lists each."""
    own = settings.own
    place = place_of(PolicyModelSettings, BACKENDS, settings.backend)
    return {address.rstrip("/"): f"{place}{name}" for name in own.exclusive for address in getattr(own, name)}


def shared_servers(settings: ModelSettings, other: ModelSettings) -> dict[str, str]:
    """Those of `servers_of` that the other policy's settings have, too."""
    return {address: field for address, field in servers_of(settings).items() if address in servers_of(other)}


def check_folders(settings: ModelSettings, models_folder: Path | None) -> None:
    """That the model and its adapters are hub ids, or below the folder. Raises DomainError BAD_MODEL."""
    if not settings.own.reads_files:
        return
    for field, source in {"model": settings.model, **_named("adapters", settings.adapters)}.items():
        if problem := models.problem_of_place(source, models_folder):
            raise DomainError(Reason.BAD_MODEL, f"{field}: {problem}", field=field)


def check_addresses(request: ModelRequest, own: ModelSettings | None, allowed: Collection[str]) -> None:
    """That each address of a server that the request names is allowed, or stands in the policy's own settings. Raises
    DomainError INVALID_SETTING."""
    settings = request.settings(own)
    place = place_of(PolicyModelSettings, BACKENDS, settings.backend)
    before = own.own if own is not None and own.backend == settings.backend else None
    for name in settings.own.credentials:
        known = {_plain(address) for address in (*allowed, *(before.addresses(name) if before is not None else ()))}
        for address in settings.own.addresses(name) if f"{place}{name}" in request.options else ():
            if _plain(address) not in known:
                expected = "expected one that the server's setting allowed_addresses lists, as prompts go there"
                raise _invalid(f"{place}{name}", f"{bounded(address, _SHOWN)}: {expected}")


def _plain(address: str) -> str:
    return address.rstrip("/")


def _places(backend: str) -> dict[str, type[BackendSettings]]:
    """The settings of all backends that the request may name, by what stands before their names."""
    return {
        place_of(PolicyModelSettings, BACKENDS, name): BACKENDS.find(name).Settings
        for name in (*with_place(PolicyModelSettings, BACKENDS), backend)
    }


def _credentials_of_others(options: Mapping[str, str], places: Mapping[str, type[BackendSettings]]) -> Iterator[str]:
    """A credential is for the address that it was given with."""
    for place, settings in places.items():
        for address, credentials in settings.credentials.items():
            if f"{place}{address}" in options:
                yield from {f"{place}{name}" for name in credentials}.difference(options)


def _put(settings: dict[str, Any], name: str, text: str, places: Mapping[str, type[BackendSettings]]) -> None:
    if name in ("model", "backend"):
        raise _invalid(name, "has a field of its own")
    if f"{name}." in places or name == BACKENDS.others:
        raise _invalid(name, f"its fields are set one by one: {name}.…")
    local = (f"{place}{field}" for place, kind in places.items() for field in kind.local_only)
    if any(name == field or name.startswith(f"{field}.") for field in local):
        raise _invalid(name, "is set in the server's settings alone")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _invalid(name, f"expected a value as JSON ({error})") from error
    _set(settings, name, value)


def _set(settings: dict[str, Any], name: str, value: object) -> None:
    *tables, last = name.split(".")
    place: Any = settings
    for table in tables:
        place = place.get(table) if isinstance(place, dict) else None
    if not isinstance(place, dict):
        raise _invalid(name, "no such setting")
    place[last] = value


def _named(table: str, values: Mapping[str, str]) -> dict[str, str]:
    return {f"{table}.{name}": value for name, value in values.items()}


def _invalid(name: str, problem: str) -> DomainError:
    return DomainError(Reason.INVALID_SETTING, f"{name}: {problem}", field=name)
