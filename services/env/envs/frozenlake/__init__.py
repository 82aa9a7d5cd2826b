"""FrozenLake with hidden symbols."""

from mulligan.env.envs.frozenlake.environment import Settings as Settings
from mulligan.env.envs.frozenlake.environment import create as create
