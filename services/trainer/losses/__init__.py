"""The built-in losses of policy gradients, a module each.

A loss exports `Settings`, a `LossSettings`: the table `[loss]` of a run, which chooses it by `name`. And it exports
`loss(terms, old_log_probs_N, advantages_N, settings)`, which returns a `Loss`: the loss of each trained token, without
the common terms, which are mismatch correction, KL divergence and entropy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from mulligan.common.plugins import Plugins, read_named
from mulligan.trainer.loss_settings import LossSettings
from mulligan.trainer.objective import Loss

LOSSES = Plugins(
    noun="loss",
    package=__name__,
    group="mulligan.losses",
    exports=("Settings", "loss"),
    default="ppo",
    settings=LossSettings,
    reserved=("settings",),  # the field that holds them on the wire
)


def read_loss(table: Any) -> LossSettings:
    """The table `[loss]`, or settings as they are. Raises ValidationError, with the places in the table."""
    found: LossSettings = read_named(LOSSES, table, LOSSES.default)
    return found


@cache
def loss_named(name: str) -> Callable[..., Loss]:
    """The function of a loss. Raises UnusablePlugin, and MissingExtra for absent packages."""
    found: Callable[..., Loss] = LOSSES.find(name).loss
    return found
