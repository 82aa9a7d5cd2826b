"""Sokoban with hidden symbols."""

from mulligan.env.envs.sokoban.environment import Settings as Settings
from mulligan.env.envs.sokoban.environment import create as create
