"""Settings of the loss: the table `[loss]`. Mirrors `LossConfig` of `mulligan.trainer.v1`."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from mulligan.common.plugins import PluginSettings
from mulligan.trainer.loss_terms import KlEstimator, KlReference, MismatchCorrection


class LossSettings(PluginSettings):
    """What every loss of policy gradients has. A loss's own `Settings` add to it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    kl_coefficient: float = Field(0.001, ge=0)
    entropy_coefficient: float = Field(0.0, ge=0)
    mismatch_correction: MismatchCorrection = MismatchCorrection.TRUNCATED
    mismatch_limit: float = Field(2.0, gt=1)
    kl_estimator: KlEstimator = KlEstimator.K3
    kl_reference: KlReference = KlReference.INITIAL
    reference_every: int = Field(100, ge=1)

    @property
    def regularizes(self) -> bool:
        """Whether there is a gradient where the advantage is 0."""
        return self.kl_coefficient > 0 or self.entropy_coefficient > 0
