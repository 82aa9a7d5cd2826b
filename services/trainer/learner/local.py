"""A learner in this process, behind the LearnerPort of the algorithm."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Self, TypeVar

from mulligan.common.inference import PublishedWeights
from mulligan.trainer.data import Datum, ModelLimits
from mulligan.trainer.learner.learner import Learner
from mulligan.trainer.learner.settings import LearnerServerSettings, LearnerSpec
from mulligan.trainer.settings import LossSettings

R = TypeVar("R")


class LocalLearner:
    """The LearnerPort without a server. A worker thread runs the learner, so that the event loop is never blocked."""

    def __init__(self, learner_id: str, spec: LearnerSpec, server: LearnerServerSettings):
        self._make: Callable[[], Learner] = partial(Learner, learner_id, spec, server)
        self._learner: Learner | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="learner")

    @classmethod
    async def create(cls, learner_id: str, spec: LearnerSpec, server: LearnerServerSettings) -> Self:
        """Loads the model. Raises DomainError INVALID_FIELD, MODEL_NOT_FOUND or UNSUPPORTED_MODEL."""
        local = cls(learner_id, spec, server)
        await local._run(lambda learner: None)
        return local

    @property
    def fingerprint(self) -> str:
        """Of the model; empty before it is loaded."""
        return self._learner.fingerprint if self._learner is not None else ""

    @property
    def limits(self) -> ModelLimits:
        """Of the model; unknown before it is loaded."""
        return self._learner.model.limits if self._learner is not None else ModelLimits(0, 0)

    @property
    def adapted_layers(self) -> tuple[str, ...]:
        return self._learner.adapted_layers if self._learner is not None else ()

    @property
    def share_done(self) -> float:
        done, total = self._learner.progress if self._learner is not None else (0, 0)
        return done / total if total else 0.0

    async def _run(self, work: Callable[[Learner], R]) -> R:
        def on_thread() -> R:
            if self._learner is None:
                self._learner = self._make()
            return work(self._learner)

        return await asyncio.get_running_loop().run_in_executor(self._thread, on_thread)

    async def forward(self, data: Sequence[Datum]) -> list[tuple[float, ...]]:
        return await self._run(lambda learner: learner.forward(data))

    async def forward_backward(self, data: Sequence[Datum], loss: LossSettings) -> dict[str, float]:
        return await self._run(lambda learner: learner.forward_backward(data, loss))

    async def optim_step(self) -> dict[str, float]:
        return await self._run(lambda learner: learner.optim_step())

    async def save_checkpoint(self, name: str) -> None:
        await self._run(lambda learner: learner.save_checkpoint(name))

    async def load_checkpoint(self, name: str) -> None:
        await self._run(lambda learner: learner.load_checkpoint(name))

    async def publish_weights(self, policy_version: int, keep: Collection[int] = ()) -> PublishedWeights:
        return await self._run(lambda learner: learner.publish_weights(policy_version, keep))

    async def close(self) -> None:
        """Waits for the current call, then frees the model."""
        self._learner = None
        await asyncio.to_thread(self._thread.shutdown)
