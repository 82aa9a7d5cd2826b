"""What `learner_service.proto` and `run_service.proto` promise. What stays on the trainer's disk, such as checkpoints
and runs, is made only where `--writes` allows it."""

from __future__ import annotations

from mulligan.conformance.report import Suite
from mulligan.conformance.target import CheckSession
from mulligan.conformance.trainer import checkpoints, learners, leases, runs, server, training
from mulligan.conformance.trainer.held import Trainer

SERVER: Suite[CheckSession] = server.suite
TRAINER: Suite[Trainer] = Suite()
TRAINER.extend([runs.suite, learners.suite, leases.suite, checkpoints.suite, training.suite])
