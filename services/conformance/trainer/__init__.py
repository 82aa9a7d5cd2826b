"""Checks of `learner_service.proto` and `run_service.proto`. Checkpoints, published weights and runs, which stay on the
trainer's disk, are made only with `--writes`."""

from __future__ import annotations

from mulligan.conformance.report import Suite
from mulligan.conformance.target import CheckSession
from mulligan.conformance.trainer import checkpoints, learners, leases, objectives, runs, server, training
from mulligan.conformance.trainer.held import Trainer

SERVER: Suite[CheckSession] = server.suite
TRAINER: Suite[Trainer] = Suite()
TRAINER.extend([runs.suite, learners.suite, objectives.suite, leases.suite, checkpoints.suite, training.suite])
