"""Settings of the environment service, including the environments that it serves.

Each TOML table `[environments.NAME]` is one environment. `kind` is a built-in environment, an installed one, or a
module. `feedback` is how much an agent learns at the end (full, unary or silent). `untrusted` runs its code in
processes with limits (`sandbox.py`). All other keys are the environment's own settings:

    [environments.small-game]
    kind = "my_package.my_game"
    size_max = 4
    feedback = "unary"
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from mulligan.common.config import ServiceSettings
from mulligan.env.base import Environment
from mulligan.env.envs import DEFAULT_ENVIRONMENTS
from mulligan.env.episodes import EpisodeLimits
from mulligan.env.load import load_or_explain


class EnvSettings(ServiceSettings):
    service: ClassVar[str] = "env"

    environments: dict[str, dict[str, Any]] = Field(
        DEFAULT_ENVIRONMENTS, min_length=1, description="Tables with `kind` and that environment's own settings."
    )
    processes: int = Field(
        1,
        ge=1,
        le=256,
        description="Server processes, at `port`, `port` + 1, … (metrics likewise), or at free ports if 0.",
    )
    max_episodes: int = Field(
        4096, ge=1, description="Live episodes per process; further ones are refused with CAPACITY_REACHED."
    )
    max_caller_episodes: int | None = Field(
        None, ge=1, description="Live episodes that one caller started; as max_episodes by default."
    )
    max_finished: int = Field(4096, ge=0, description="Finished episodes whose answers are kept for repeated calls.")
    answers_gib: float = Field(
        2.0, gt=0, description="Memory of all answers that are kept for repeated calls, about, per process."
    )
    lease_seconds: float = Field(600.0, gt=0, le=86_400, description="An episode idle for longer expires.")
    step_timeout_seconds: float = Field(60.0, gt=0, description="A step that takes longer ends its episode as TIMEOUT.")
    worker_threads: int = Field(16, ge=1, le=512, description="Threads for environment code.")
    max_hanging_threads: int = Field(64, ge=0, description="Hanging threads that are replaced.")

    @model_validator(mode="after")
    def _ports_exist(self) -> Self:
        for name, port in (("port", self.port), ("metrics_port", self.metrics_port)):
            if port + self.processes - 1 > 65535:
                raise ValueError(f"processes: {self.processes} of them need ports above 65535, from {name} = {port}")
        return self

    @property
    def limits(self) -> EpisodeLimits:
        return EpisodeLimits(
            self.max_episodes,
            self.max_caller_episodes or self.max_episodes,
            self.max_finished,
            lease_seconds=self.lease_seconds,
            max_bytes=int(self.answers_gib * 2**30),
        )

    def create_environments(self) -> dict[str, Environment]:
        """Raises ValueError that names the setting."""
        return {name: self._create(name, table) for name, table in self.environments.items()}

    def _create(self, name: str, table: Mapping[str, Any]) -> Environment:
        settings = dict(table)
        untrusted = settings.pop("untrusted", False)
        if not isinstance(untrusted, bool):
            raise ValueError(f"environments.{name}.untrusted: expected true or false, not {untrusted!r}")
        if not untrusted:
            return load_or_explain(name, settings)
        from mulligan.env import sandbox

        given = {key: settings.pop(key) for key in sandbox.LIMITS if key in settings}
        try:
            limits = sandbox.read_limits(given)
        except ValueError as error:
            raise ValueError(f"environments.{name}: {error}") from error
        return sandbox.sandboxed(name, settings, limits, self.step_timeout_seconds)
