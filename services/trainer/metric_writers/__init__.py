"""Metric writers, a module each: where else the metrics of a run are written while it trains.

A module exports

    check() -> None                       # raises MissingExtra where its packages are not installed
    open(run: TrackedRun) -> MetricWriter  # imports what is heavy

and may export

    ADDRESS = "WANDB_BASE_URL"             # the variable with the address of its server
    KEYS = ("WANDB_API_KEY",)              # the variables with what is sent there, and that others must not read

`tracking.writers` of a run has names of modules here, of entry points of the group `mulligan.metric_writers`, or of
any importable modules. All calls of a writer come from one thread of its own. So it may wait for a network, and it may
raise anything: the run does not wait for it.

A run names neither addresses nor folders. The address and the credentials of a tracking server are those of the
trainer's own environment variables, as the writer's library reads them. Files lie in `TrackedRun.folder`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from mulligan.common.errors import DomainError, Reason
from mulligan.common.extras import MissingExtra
from mulligan.common.http_keys import key_problem, userinfo_problem
from mulligan.common.plugins import Plugins, UnusablePlugin


@dataclass(frozen=True)
class TrackedRun:
    """`run_id` is the same when the run is resumed: the writer goes on with what it wrote before. `settings` are all
    of the run's, as plain values. `folder`, below the run's, is the writer's alone; it need not exist yet."""

    run_id: str
    project: str
    folder: Path
    settings: Mapping[str, Any]


class MetricWriter(Protocol):
    def write(self, step: int, metrics: Mapping[str, float], time: datetime) -> None:
        """Steps do not always grow. After an error, or where the trainer was killed, the same metrics may come again:
        where it can, a writer does not write them twice."""

    def close(self) -> None:
        """Waits until everything is written."""


METRIC_WRITERS = Plugins(
    noun="metric writer",
    package=__name__,
    group="mulligan.metric_writers",
    exports=("check", "open"),
)


def check_writers(names: Iterable[str], *, insecure: bool = False) -> None:
    """Raises DomainError INVALID_SETTING for a writer that is unknown or not installed, or would send its credentials
    to another machine without TLS; `insecure` allows that."""
    for index, name in enumerate(names):
        field = f"tracking.writers[{index}]"
        try:
            writer = METRIC_WRITERS.find(name)
            writer.check()
            if problem := _unprotected(writer, insecure=insecure):
                raise UnusablePlugin(problem)
        except (UnusablePlugin, MissingExtra) as error:
            said = f"{name!r} {error}" if isinstance(error, MissingExtra) else str(error)
            raise DomainError(Reason.INVALID_SETTING, f"{field}: {said}", field=field) from error


def _unprotected(writer: Any, *, insecure: bool) -> str:
    """Why the credentials of a writer must not go to its server."""
    variable = getattr(writer, "ADDRESS", "")
    address = os.environ.get(variable, "") if variable else ""
    if not address.lower().startswith(("http://", "https://")):
        return ""
    keys = getattr(writer, "KEYS", ())
    if problem := userinfo_problem(address):
        return f"{variable}: {problem}; {' or '.join(keys)} is for the key"
    if any(map(os.environ.get, keys)) and (problem := key_problem(address, insecure=insecure)):
        return f"{variable}: {problem}, or the trainer's setting `insecure`"
    return ""


def require(extra: str, *modules: str) -> None:
    """Raises MissingExtra if one of the modules is not installed. Imports none of them."""
    for module in modules:
        if find_spec(module) is None:
            raise MissingExtra(extra, ModuleNotFoundError(f"No module named {module!r}"))
