"""An advantage estimator of another package: half of the reward, for each token."""

from __future__ import annotations

from collections.abc import Sequence

from mulligan.common.plugins import PluginSettings
from mulligan.trainer.advantages import Advantage, Return


class Settings(PluginSettings):
    share: float = 0.5


def estimate(groups: Sequence[Sequence[Return]], settings: Settings) -> list[list[Advantage]]:
    return [[(sample.reward * settings.share,) * sample.tokens for sample in group] for group in groups]
