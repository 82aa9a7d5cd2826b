"""Questions that take several searches, with the search tool."""

from mulligan.env.envs.hotpotqa.environment import Settings as Settings
from mulligan.env.envs.hotpotqa.environment import create as create
