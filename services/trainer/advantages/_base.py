"""Settings of an estimator that changes what another one, its base, is given or returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from pydantic import Field, model_validator

from mulligan.common.plugins import PluginSettings, read_chosen
from mulligan.trainer.advantages import ADVANTAGES, Advantage, Return, estimated


class WithBase(PluginSettings):
    """`base` names any advantage estimator, `base_settings` is its table. Both are checked when they are read."""

    base: str = ADVANTAGES.default
    base_settings: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _base_is_usable(self) -> Self:
        read_chosen(ADVANTAGES, self.base, self.base_settings, name_at="base", at=("base_settings",))
        return self

    def of_base(self, groups: Sequence[Sequence[Return]]) -> list[list[Advantage]]:
        """What the base estimates for these groups."""
        return estimated(self.base, self.base_settings, groups)
