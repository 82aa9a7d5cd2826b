"""Environments that come along, made of a table as in a server's settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mulligan.env.base import own_settings
from mulligan.env.envs import ENVIRONMENTS


def creator(kind: str) -> Callable[[str, Mapping[str, object]], Any]:
    """A function of the environment's name and its table, without `kind`."""
    plugin = ENVIRONMENTS.find(kind)
    return lambda name, table: plugin.create(name, own_settings(plugin, table))
