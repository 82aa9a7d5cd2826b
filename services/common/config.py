"""Settings of a service, from a TOML file, environment variables and flags (pydantic-settings).

Flags win over variables, and variables over the file. A service subclasses `ServiceSettings`, sets `service`, and calls
`load`. `python -m mulligan.env --config env.toml --port 50051`, `MULLIGAN_ENV_PORT=50051` and `port = 50051` mean the
same. One file may hold the settings of all services, in the tables [env], [policy], [memory] and [trainer]; each
service reads its own.
"""

from __future__ import annotations

import argparse
import os
import sys
import tomllib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from mulligan.common.addresses import is_loopback
from mulligan.common.callers import CallerLimits
from mulligan.common.http_keys import key_problem, userinfo_problem
from mulligan.common.number_settings import NumberSettings
from mulligan.common.secret_flags import has_setting, secret_fields, secrets_among
from mulligan.common.suggest import did_you_mean, problems
from mulligan.common.text import bounded
from mulligan.common.tls import BadTls, ClientTls, read_client_tls
from mulligan.common.tokens import KnownTokens, TokenFile

_SHOWN = 200  # characters of an address
_OTLP_INSECURE = ("OTEL_EXPORTER_OTLP_TRACES_INSECURE", "OTEL_EXPORTER_OTLP_INSECURE")
SERVICES = ("env", "policy", "memory", "trainer")

# gRPC's core writes lines of its own to stderr, past the log and its limits: of each connection to a port with TLS that
# speaks none, and the bytes of a server name that it does not know. It reads this variable when it is imported, which
# each service does after this module.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def _with_token(file: Path) -> Path:
    TokenFile(file)  # raises BadTokens
    return file


ClientTokenFile = Annotated[Path, AfterValidator(_with_token)]  # read at the start, and again when it changes


class ServiceSettings(NumberSettings, BaseSettings):
    """Settings that every service has."""

    model_config = SettingsConfigDict(extra="forbid", cli_kebab_case=True, cli_implicit_flags=True)
    service: ClassVar[str]

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for all interfaces.")
    port: int = Field(0, ge=0, le=65535, description="Port to listen on; 0 picks a free one, printed at start.")
    max_message_bytes: int = Field(64 * 2**20, ge=2**10, description="Largest request or response.")
    default_deadline_seconds: float = Field(3600.0, gt=0, description="Deadline of a call whose caller sets none.")
    write_seconds: float = Field(60.0, gt=0, description="A stream whose caller reads nothing for longer is ended.")
    receive_seconds: float = Field(60.0, gt=0, description="A request that takes longer to arrive is refused.")
    max_connections: int = Field(4096, ge=1, description="Connections; further ones are closed at once.")
    max_idle_seconds: float = Field(
        600.0, gt=0, le=86_400, description="A connection without calls is closed after this time, or up to twice it."
    )
    max_streams: int = Field(4096, ge=1, description="Calls of a connection at once; further ones wait.")
    max_caller_calls: int = Field(
        16_384, ge=1, description="Calls of one caller at once. A caller is its token, its certificate, or its address."
    )
    max_caller_rate: float = Field(0.0, ge=0, description="Calls of one caller per second; 0: any number.")
    max_caller_bytes: int = Field(
        2**30, ge=2**10, description="Size of the requests and answers of one caller's calls, where others are refused."
    )
    drain_seconds: float = Field(30.0, ge=0, description="Time that calls in flight get after SIGTERM.")
    log_format: Literal["console", "json"] = Field("console", description="One line per request either way.")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    metrics_port: int = Field(
        -1, ge=-1, le=65535, description="Port of Prometheus metrics over HTTP, at `host`; 0 picks one, -1: none."
    )
    otlp_endpoint: str = Field(
        "",
        description="Collector of traces, which takes OTLP over gRPC: http://HOST:PORT, or https:// over TLS; "
        "OpenTelemetry's variables count, too, such as OTEL_EXPORTER_OTLP_ENDPOINT. Without any there are no traces.",
    )
    trace_ratio: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of the traces beginning here that are recorded; all, unless OTEL_TRACES_SAMPLER is set.",
    )
    tokens_folder: Path | None = Field(
        None,
        description="When set, calls need `authorization: Bearer TOKEN`. It has a file per role (reader, actor, "
        "trainer, admin) with its tokens, one per line.",
    )
    tls_certificate: Path | None = Field(None, description="PEM file; with tls_key, the server speaks TLS.")
    tls_key: Path | None = None
    tls_client_ca: Path | None = Field(
        None, description="PEM file; callers need a certificate of its authorities, which may give them a role."
    )

    insecure: bool = Field(
        False, description="Other machines may be served without credentials or TLS, and sent tokens without TLS."
    )

    @model_validator(mode="after")
    def _is_closed(self) -> Self:
        if self.insecure or is_loopback(self.host):
            return self
        if not (self.tokens_folder or self.tls_client_ca):
            raise ValueError(
                f"host {self.host}: others could reach it, and make every call: set tokens_folder or tls_client_ca, or "
                "allow it with --insecure"
            )
        if not (self.tls_certificate or self.tls_key or self.tls_client_ca):  # of one alone, the next check speaks
            raise ValueError(
                f"host {self.host}: others could read the tokens of calls on their way: set tls_certificate and "
                "tls_key, or allow it with --insecure"
            )
        return self

    @model_validator(mode="after")
    def _tls_is_complete(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca: needs tls_certificate and tls_key")
        return self

    @model_validator(mode="after")
    def _traces_can_be_sent(self) -> Self:
        if self.otlp_endpoint:
            try:
                found = urlsplit(self.otlp_endpoint)
                is_usable = bool(found.scheme in ("http", "https") and found.hostname and found.port)
            except ValueError:
                is_usable = False
            if not is_usable or "@" in self.otlp_endpoint or found.path.strip("/") or found.query or found.fragment:
                raise ValueError("otlp_endpoint: expected http://HOST:PORT or https://HOST:PORT, nothing else")
        if self.traces_to:
            if problem := self._otlp_problem:
                raise ValueError(problem)
            for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
                if (said := os.environ.get(name, "grpc")) != "grpc":
                    raise ValueError(f"{name}: expected grpc, the protocol of services, not {said}")
        return self

    @property
    def _otlp_problem(self) -> str:
        """Why OpenTelemetry must not send what its variables say."""
        if problem := userinfo_problem(self.traces_to):
            return f"the collector of traces: {problem}; OTEL_EXPORTER_OTLP_HEADERS is for the key"
        address = self.traces_to if "://" in self.traces_to else f"http://{self.traces_to}"
        names = ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS")
        headers = next((name for name in names if os.environ.get(name)), "")
        if not headers or not _is_plain(self.traces_to) or not key_problem(address, insecure=self.insecure):
            return ""
        host = bounded(urlsplit(address).netloc, _SHOWN)
        return (
            f"{headers}: the headers, which may have a key, would go to {host} without TLS: expected a collector at "
            "https://, or --insecure"
        )

    @property
    def traces_to(self) -> str:
        """The collector of traces; empty if there are no traces."""
        if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
            return ""
        if os.environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() == "none":
            return ""
        variables = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
        return self.otlp_endpoint or next((found for name in variables if (found := os.environ.get(name))), "")

    @property
    def warnings(self) -> list[str]:
        """What whoever starts the service should know of these settings."""
        return []

    @property
    def caller_limits(self) -> CallerLimits:
        messages = max(1, self.max_caller_bytes // self.max_message_bytes // 2)
        return CallerLimits(
            self.max_caller_calls,
            self.max_caller_rate,
            self.max_caller_bytes,
            receiving=messages,
            streams=messages,
            receive_seconds=self.receive_seconds,
        )

    def client_tls(self, prefix: str) -> ClientTls | None:
        """How a client speaks TLS by the settings `PREFIX_tls_ca`, `…_name`, `…_cert` and `…_key`; None if none of them
        is set. Raises ValueError, which names the settings."""
        ca, name, cert, key = (getattr(self, f"{prefix}_tls_{part}") for part in ("ca", "name", "cert", "key"))
        try:
            return read_client_tls(ca, name, cert, key)
        except (BadTls, ValueError) as error:
            raise ValueError(f"{prefix}_tls_…: {error}") from error

    @cached_property
    def tokens(self) -> KnownTokens | None:
        """Those that calls need; None if they need none. Raises BadTokens."""
        closed = self.tokens_folder is not None or self.tls_client_ca is not None
        return KnownTokens(self.tokens_folder) if closed else None

    @model_validator(mode="after")
    def _tokens_are_there(self) -> Self:
        try:
            _ = self.tokens
        except ValueError as error:
            raise ValueError(f"tokens_folder: {error}") from error
        return self

    @classmethod
    def _refuse_unknown_variables(cls, prefix: str) -> None:
        """pydantic-settings ignores variables that it does not know, so a mistyped one would have no effect."""
        for variable in os.environ:
            name = variable.removeprefix(prefix).partition("__")[0].lower()
            if variable.startswith(prefix) and name not in cls.model_fields:
                near = did_you_mean(variable, (f"{prefix}{known.upper()}" for known in cls.model_fields))
                refuse(cls.service, f"{variable}: no such setting{near}")

    @classmethod
    def _refuse_secret_flags(cls, given: dict[str, Any], prefix: str) -> None:
        """Also those in JSON, such as `--openai '{"api_key": "KEY"}'`, and passwords in URLs."""
        found = []
        for name, problem in secrets_among(cls, given):
            variable = f"the variable {prefix}{name.upper().replace('.', '__')}, or "
            other = f", or {name}_file" if has_setting(cls, f"{name}_file") else ""
            found.append(
                f"{name}: {problem}, and other users see flags: expected {variable if name.islower() else ''}{name} in "
                f"the file of --config{other}"
            )
        if found:
            refuse(cls.service, *found)

    @classmethod
    def load(cls, arguments: Sequence[str]) -> Self:
        """Reads all sources. On invalid settings it prints a line per setting and exits with status 2."""
        argv = list(arguments)
        config = _take_config(argv)
        if config == "":
            refuse(cls.service, "--config: needs a file")
        toml = Path(config) if config else None
        if toml is not None and not toml.is_file():
            refuse(cls.service, f"--config {toml}: no such file")
        prefix = f"MULLIGAN_{cls.service.upper()}_"
        cls._refuse_unknown_variables(prefix)

        try:
            in_file = _read_settings(cls.service, toml) if toml else {}
        except (OSError, ValueError) as error:
            refuse(cls.service, str(error))

        class Loaded(cls):  # type: ignore[valid-type,misc]
            @classmethod
            def settings_customise_sources(
                cls, settings_cls: type[BaseSettings], **_: PydanticBaseSettingsSource
            ) -> tuple[PydanticBaseSettingsSource, ...]:
                flags: CliSettingsSource[Any] = CliSettingsSource(
                    settings_cls, root_parser=_parser(cls), cli_parse_args=argv
                )
                cls._refuse_secret_flags(flags(), prefix)
                return (
                    flags,
                    EnvSettingsSource(settings_cls, env_prefix=prefix, env_nested_delimiter="__"),
                    InitSettingsSource(settings_cls, init_kwargs=in_file),
                )

        try:
            loaded: Self = Loaded()
        except ValidationError as error:
            refuse(cls.service, *(f"{name}: {said}" for name, said in problems(error, cls).items()))
        except ValueError as error:  # a source that cannot be read as its setting's type
            refuse(cls.service, str(error))
        return loaded


def _is_plain(collector: str) -> bool:
    """Whether OpenTelemetry's exporter sends without TLS."""
    scheme = collector.partition("://")[0].lower() if "://" in collector else ""
    said = next(filter(None, map(os.environ.get, _OTLP_INSECURE)), "")
    return scheme != "https" and (said.lower() == "true" if said else scheme == "http")


def read_service_tables(file: Path) -> dict[str, dict[str, Any]]:
    """The tables of a TOML file that holds the settings of several services, by service; empty for a file of one
    service. Raises ValueError for a file that is neither, OSError for one that cannot be read."""
    content = _read_toml(file)
    if not content.keys() & set(SERVICES):
        return {}
    for name, table in content.items():
        if name not in SERVICES:
            raise ValueError(
                f"{file}: {name!r} stands beside a table of a service{did_you_mean(name, SERVICES)}; a file holds the "
                f"settings of one service, or these tables alone: {', '.join(f'[{one}]' for one in SERVICES)}"
            )
        if not isinstance(table, dict):
            raise ValueError(f"{file}: {name!r} must be a table of settings, [{name}]")
    return content


def _read_settings(service: str, file: Path) -> dict[str, Any]:
    tables = read_service_tables(file)
    return tables.get(service, {}) if tables else _read_toml(file)


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:  # TOML is UTF-8, whatever the locale says
            return tomllib.load(opened)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def refuse(service: str, *problems: str) -> NoReturn:
    """Prints a line per problem and exits with status 2, as for a bad command line."""
    print(f"{service}: bad settings", *(f"  {problem}" for problem in problems), sep="\n", file=sys.stderr)
    sys.exit(2)


class _Parser(argparse.ArgumentParser):
    secrets: frozenset[str] = frozenset()  # settings that are no flags

    def parse_known_args(self, *given: Any, **named: Any) -> Any:
        for action in self._actions:
            if action.dest in self.secrets:
                action.help = argparse.SUPPRESS  # `load` refuses it
        return super().parse_known_args(*given, **named)

    def error(self, message: str) -> NoReturn:
        """Adds the most similar flag for an unknown one."""
        flag = next((word.partition("=")[0] for word in message.split() if word.startswith("--")), "")
        known = [name for name, action in self._option_string_actions.items() if action.help != argparse.SUPPRESS]
        near = did_you_mean(flag, known) if flag and "unrecognized" in message else ""
        super().error(message + near)


def _parser(settings: type[ServiceSettings]) -> argparse.ArgumentParser:
    service = settings.service
    parser = _Parser(
        prog=f"python -m mulligan.{service}",
        epilog=f"--config FILE.toml reads settings from a file, or its table [{service}]; "
        f"MULLIGAN_{service.upper()}_NAME=VALUE sets one, too. Flags win over variables, variables over the file. "
        "Secrets are no flags, which other users see: a file or a variable has them.",
    )
    parser.secrets = secret_fields(settings)
    return parser


def _take_config(argv: list[str]) -> str | None:
    for index, argument in enumerate(argv):
        if argument == "--config":
            del argv[index]
            return argv.pop(index) if index < len(argv) else ""
        if argument.startswith("--config="):
            del argv[index]
            return argument.removeprefix("--config=")
    return None
