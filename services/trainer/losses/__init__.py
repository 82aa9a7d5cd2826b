"""The built-in losses of policy gradients, a module each.

A loss exports `Settings`, a `PluginSettings`, and `loss(terms, old_log_probs_N, advantages_N, settings)`. The latter
returns a `Loss`: the loss of each trained token, without the common terms, which are mismatch correction, KL divergence
and entropy. `[loss]` chooses a loss by `name`, and has its settings beside the common ones.
"""

from __future__ import annotations

from mulligan.common.plugins import Plugins, PluginSettings

LOSSES = Plugins("loss", __name__, "mulligan.losses", ("Settings", "loss"), "ppo", PluginSettings)
