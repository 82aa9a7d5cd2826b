"""Checks of `proto/mulligan/env/v1/env_service.proto`: of the server (`SERVER`) and of each environment (`ENVIRONMENT`,
or `WITHOUT_EPISODES` if it is unavailable)."""

from __future__ import annotations

from mulligan.conformance.env import episodes, forks, hostile, listing, play, server, starts, steps
from mulligan.conformance.env.game import Game
from mulligan.conformance.report import Suite
from mulligan.conformance.target import CheckSession

SERVER: Suite[CheckSession] = server.suite
ENVIRONMENT: Suite[Game] = Suite()
ENVIRONMENT.extend([listing.suite, episodes.suite, starts.suite, steps.suite, play.suite, forks.suite, hostile.suite])
WITHOUT_EPISODES: Suite[Game] = Suite()
WITHOUT_EPISODES.checks = [*listing.suite.checks, episodes.suite.checks[0]]
