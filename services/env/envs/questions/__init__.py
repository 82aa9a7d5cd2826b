"""Questions from files, one turn each: multiple choice, or exact answers."""

from mulligan.env.envs.questions.environment import Settings as Settings
from mulligan.env.envs.questions.environment import create as create
