"""The built-in objectives of the learner, a module each. `mulligan.trainer.objective` says what one is made of.

On the wire an objective has the name of its module: `coefficients`, or `acme.objectives.mine`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache

from mulligan.common.plugins import Plugins, UnusablePlugin
from mulligan.trainer.objective import Loss, Objective, inputs

OBJECTIVES = Plugins("objective", __name__, "mulligan.objectives", ("Inputs", "loss"), "policy_gradient")


@cache
def named(name: str) -> type[Objective]:
    """The inputs of an objective. Raises UnusablePlugin, and MissingExtra for absent packages."""
    kind = OBJECTIVES.find(name).Inputs
    if not (isinstance(kind, type) and issubclass(kind, Objective)):
        raise UnusablePlugin(f"{name!r} is no objective: its `Inputs` is no Objective")
    try:
        inputs(kind)
    except (TypeError, NameError) as error:
        raise UnusablePlugin(f"{name!r} is no objective: {error}") from error
    if not hasattr(sys.modules[kind.__module__], "loss"):
        raise UnusablePlugin(
            f"{name!r} is no objective: `loss` is not in {kind.__module__}, the module of its `Inputs`"
        )
    return kind


def name_of(kind: type[Objective]) -> str:
    return kind.__module__.removeprefix(f"{__name__}.")


def loss_of(kind: type[Objective]) -> Callable[..., Loss]:
    loss: Callable[..., Loss] = sys.modules[kind.__module__].loss
    return loss
