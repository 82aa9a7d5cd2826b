"""Settings of the loss: the table `[loss]`. Mirrors `LossConfig` of `mulligan.trainer.v1`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from mulligan.common.flat_settings import FlatSettings
from mulligan.common.plugins import Plugins
from mulligan.trainer.loss_terms import KlEstimator, KlReference, MismatchCorrection
from mulligan.trainer.losses import LOSSES


class LossSettings(FlatSettings):
    """Of policy gradients. The chosen loss has settings of its own beside these: `LossSettings(dual_clip=0)`."""

    plugins: ClassVar[Plugins] = LOSSES
    name: str = LOSSES.default
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
