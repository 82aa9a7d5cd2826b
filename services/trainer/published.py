"""The policy as a run uses it: always at the version that the run published last."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from services.common.errors import DomainError, Reason
from services.common.types import Completion, PolicyInfo, Prompt, PublishedWeights, SamplingParams
from services.trainer.interfaces import LearnerPort, PolicyPort

RESTORE_ATTEMPTS = 3


class ForeignWeights(RuntimeError):
    """Somebody else has published to the policy that the run trains."""


class PublishedPolicy:
    """A `PolicyPort` that asks every call for the run's version.

    A policy service that was restarted has forgotten its weights: it refuses, is given them again, and the call is
    repeated. Raises ForeignWeights when an answer comes from a version that the run did not publish.
    """

    def __init__(self, policy: PolicyPort, learner: LearnerPort, notice: Callable[[str], None]):
        self._policy = policy
        self._learner = learner
        self._notice = notice
        self._weights: PublishedWeights | None = None
        self._restoring = asyncio.Lock()

    @property
    def version(self) -> int:
        return self._weights.policy_version if self._weights else 0

    async def publish(self) -> int:
        """Makes the learner's present weights the policy's next version. Versions never repeat, over all runs."""
        version = max(self.version, (await self._policy.info()).policy_version) + 1
        weights = await self._learner.publish_weights(version)
        await self._policy.update_weights(weights)
        self._weights = weights
        return version

    async def info(self) -> PolicyInfo:
        return await self._policy.info()

    async def update_weights(self, weights: PublishedWeights) -> None:
        await self._policy.update_weights(weights)
        self._weights = weights

    async def tokenize(self, prompt: Prompt | str) -> tuple[int, ...]:
        return await self._policy.tokenize(prompt)

    async def generate(
        self, prompt: Prompt, sampling: SamplingParams, *, request_id: str = "", min_policy_version: int | None = None
    ) -> Completion:
        for attempt in range(RESTORE_ATTEMPTS + 1):
            try:
                completion = await self._policy.generate(
                    prompt, sampling, request_id=request_id, min_policy_version=self.version
                )
            except DomainError as error:
                if error.reason is not Reason.POLICY_VERSION_TOO_OLD or attempt == RESTORE_ATTEMPTS:
                    raise
                await self._restore()
                continue
            for span in completion.policy_versions:
                if span.policy_version != self.version:
                    raise ForeignWeights(
                        f"the policy serves version {span.policy_version}, but this run published {self.version}: "
                        "another run or an administrator updates the same policy"
                    )
            return completion
        raise AssertionError("unreachable")

    async def _restore(self) -> None:
        async with self._restoring:
            if self._weights is None or (await self._policy.info()).policy_version >= self.version:
                return
            self._notice(f"the policy service lost version {self.version}; publishing it again")
            await self._policy.update_weights(self._weights)
