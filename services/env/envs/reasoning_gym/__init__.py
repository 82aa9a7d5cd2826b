"""reasoning-gym's generators of questions."""

from mulligan.env.envs.reasoning_gym.environment import Settings as Settings
from mulligan.env.envs.reasoning_gym.environment import create as create
