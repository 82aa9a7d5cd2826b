"""Any environment of Gymnasium."""

from mulligan.env.envs.gymnasium.environment import Settings as Settings
from mulligan.env.envs.gymnasium.environment import create as create
