"""Settings of a policy, with those of its backend, which types do not know."""

from __future__ import annotations

from typing import Any

from mulligan.policy.config import PolicyModelSettings


def model_settings(**settings: Any) -> PolicyModelSettings:
    return PolicyModelSettings(**settings)
