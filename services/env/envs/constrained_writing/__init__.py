"""Sentences under constraints that a program checks."""

from mulligan.env.envs.constrained_writing.environment import Settings as Settings
from mulligan.env.envs.constrained_writing.environment import create as create
