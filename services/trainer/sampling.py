"""Sampling clients of a run: any policy by its name, and the policy that the run trains, at its published version."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import (
    CallOptions,
    Completion,
    Feature,
    PolicyInfo,
    Prompt,
    PublishedWeights,
    SamplingParams,
    VersionState,
    WeightsKind,
)
from mulligan.trainer.interfaces import LearnerPort, PolicyPort, Upload

RESTORE_ATTEMPTS = 3
_ANOTHER_MODEL = (
    "the policy was given another model: load the run's own again with `mulligan policy load`, "
    "then `mulligan resume RUN`"
)
_GOES_ON = "`mulligan resume RUN` goes on from the run's last checkpoint under a new version"
_ADVICE = {
    Reason.CANARY_FAILED: "the engine's log-probabilities under these weights are not the trainer's, so the policy "
    f"serves the version before. The policy service's log and `mulligan policy versions` say more; {_GOES_ON}",
    Reason.VERSION_CONFLICT: "this version was refused or rolled back, or somebody else publishes to this policy: see "
    f"`mulligan policy versions`; {_GOES_ON}",
    Reason.BAD_WEIGHTS_URI: "the policy service reads weights from below its weights_folder alone: give it the "
    "trainer's, or set the trainer's weights_transfer to \"upload\"",
    Reason.WEIGHTS_NOT_FOUND: "where the policy service does not see the trainer's weights_folder, set the trainer's "
    'weights_transfer to "upload"',
}


@dataclass(frozen=True)
class NamedPolicy:
    """A `SamplingClient` for one policy of a service.

    `name` is as in the service's settings, "" for the default policy; `info` is what the policy said of itself when it
    was opened. An engine without seeds is called without one, so its answers cannot be repeated.
    """

    port: PolicyPort
    name: str
    info: PolicyInfo

    @classmethod
    async def open(cls, port: PolicyPort, name: str) -> NamedPolicy:
        """Raises DomainError UNKNOWN_POLICY."""
        return cls(port, name, await port.info(name))

    async def generate(
        self, prompt: Prompt, sampling: SamplingParams, options: CallOptions = CallOptions()
    ) -> Completion:
        if Feature.SEED not in self.info.features:
            sampling = replace(sampling, seed=None)
        return await self.port.generate(prompt, sampling, replace(options, policy=self.name))

    async def tokenize(self, prompt: Prompt | str, options: CallOptions = CallOptions()) -> tuple[int, ...]:
        return await self.port.tokenize(prompt, replace(options, policy=self.name))


class ForeignWeights(RuntimeError):
    """The policy serves a version that the run did not publish."""


class VersionLost(RuntimeError):
    """The policy no longer has the run's version and refuses to load it again."""


class ServedPolicy:
    """The `SamplingClient` of a run without a learner: its policy as it serves when `publish` is called.

    Raises ForeignWeights when it answers with other weights later. That ends the run.
    """

    canary_difference: float | None = None  # nothing is published, so nothing is checked

    def __init__(self, actor: NamedPolicy):
        self.info = actor.info
        self._actor = actor
        self.version = actor.info.policy_version

    async def publish(self) -> int:
        """Publishes nothing. Returns the version that serves."""
        if self.version != (served := (await self._actor.port.info(self._actor.name)).policy_version):
            raise self._foreign(served)
        return self.version

    async def tokenize(self, prompt: Prompt | str, options: CallOptions = CallOptions()) -> tuple[int, ...]:
        return await self._actor.tokenize(prompt, options)

    async def generate(
        self, prompt: Prompt, sampling: SamplingParams, options: CallOptions = CallOptions()
    ) -> Completion:
        completion = await self._actor.generate(prompt, sampling, options)
        for span in completion.policy_versions:
            if span.policy_version != self.version:
                raise self._foreign(span.policy_version)
        return completion

    def _foreign(self, version: int) -> ForeignWeights:
        return ForeignWeights(
            f"the policy serves version {version}, and this run, which learns by its memory alone, began with version "
            f"{self.version}: another run or an administrator updated it. `mulligan resume RUN` goes on with it so"
        )


class PublishedPolicy:
    """The `SamplingClient` of the policy that a run trains. Every call asks for the run's version.

    `publish` has the learner write its weights, uploads them if there is an `upload`, and calls `update_weights`, which
    checks them. The learner deletes old versions of its files, but none that `keeps` names. `generate` asks for that
    version, and takes tokens of those that are published while it waits. A policy service that lost the version in a
    restart refuses; then the weights are loaded again and the call is repeated.

    Raises ForeignWeights when the policy serves a version of somebody else, and VersionLost when the run's version was
    rolled back or the policy has another model. Both end the run.
    """

    def __init__(
        self,
        actor: NamedPolicy,
        learner: LearnerPort,
        notice: Callable[[str], None],
        upload: Upload | None = None,
        *,
        dtype: str = "",
    ):
        self.info = actor.info
        self._actor = actor
        self._policy = actor.port
        self._name = actor.name
        self._learner = learner
        self._notice = notice
        self._upload = upload
        self._dtype = dtype
        self._weights: PublishedWeights | None = None
        self.keeps: tuple[int, ...] = ()  # versions of this policy that another one still serves
        self._sent = 0  # the newest version that the policy may have of this run
        self._updating = asyncio.Lock()
        # Largest log-probability difference in the last weight check; None if none ran.
        self.canary_difference: float | None = None

    @property
    def version(self) -> int:
        return self._weights.policy_version if self._weights else 0

    @property
    def weights(self) -> PublishedWeights:
        """Those that were published last."""
        assert self._weights is not None, "nothing was published"
        return self._weights

    async def publish(self) -> int:
        """Publishes the learner's weights as the policy's next version. No two publications have the same number."""
        version = await self._next()
        await self._serve(await self._learner.publish_weights(version, self.keeps))
        return version

    async def publish_as(self, weights: PublishedWeights) -> None:
        """Publishes weights that were published to another policy, under a number of this policy's own."""
        await self._serve(replace(weights, policy_version=await self._next()))

    async def _serve(self, weights: PublishedWeights) -> None:
        async with self._updating:
            self._sent = weights.policy_version
            await self._update(weights)
            self._weights = weights

    async def tokenize(self, prompt: Prompt | str, options: CallOptions = CallOptions()) -> tuple[int, ...]:
        return await self._actor.tokenize(prompt, options)

    async def generate(
        self, prompt: Prompt, sampling: SamplingParams, options: CallOptions = CallOptions()
    ) -> Completion:
        for attempt in range(RESTORE_ATTEMPTS + 1):
            asked = self.version
            try:
                completion = await self._actor.generate(prompt, sampling, replace(options, min_policy_version=asked))
            except DomainError as error:
                if error.reason is not Reason.POLICY_VERSION_TOO_OLD or attempt == RESTORE_ATTEMPTS:
                    raise
                await self._restore()
                continue
            for span in completion.policy_versions:
                if not asked <= span.policy_version <= self._sent:  # versions may be published meanwhile
                    raise self._foreign(span.policy_version)
            return completion
        raise AssertionError("unreachable")

    async def _next(self) -> int:
        newest = await self._check() if self._weights else await self._newest()
        return max(newest, *self.keeps, 0) + 1  # a policy that forgot its versions would have their files overwritten

    async def _newest(self) -> int:
        """The greatest version that the policy ever had, including refused and rolled back ones."""
        known = await self._policy.versions(self._name)
        served = (await self._policy.info(self._name)).policy_version
        return max([served, *(version.policy_version for version in known)])

    async def _check(self) -> int:
        """The run's version. A policy with a lesser version has lost the run's in a restart.

        Raises ForeignWeights for a greater version, and DomainError VERSION_CONFLICT if the run's was withdrawn.
        """
        served = (await self._policy.info(self._name)).policy_version
        if served > self.version:
            raise self._foreign(served)
        if served < self.version:
            for version in await self._policy.versions(self._name):
                if version.policy_version == self.version and version.state is VersionState.WITHDRAWN:
                    problem = version.problem or "it was rolled back"
                    error = DomainError(Reason.VERSION_CONFLICT, f"version {self.version}: {problem}")
                    raise _advised(error, _ADVICE[error.reason])
        return self.version

    async def _restore(self) -> None:
        async with self._updating:
            if self._weights is None or (await self._policy.info(self._name)).policy_version >= self.version:
                return
            self._notice(f"the policy service lost version {self.version}; publishing it again")
            try:
                await self._update(self._weights)
            except DomainError as error:
                if error.reason not in (*_ADVICE, Reason.MODEL_MISMATCH):
                    raise
                raise VersionLost(str(error)) from error

    async def _update(self, weights: PublishedWeights) -> None:
        if self._upload:
            path = Path(unquote(urlsplit(weights.uri).path))
            uri = await self._upload(path, weights.kind, weights.sha256, self._name)
            weights = replace(weights, uri=uri)
        try:
            self.canary_difference = await self._policy.update_weights(weights, self._name)
        except DomainError as error:
            raise _advised(error, await self._advice(error.reason, weights.kind)) from error

    async def _advice(self, reason: Reason, kind: WeightsKind) -> str:
        """What a person can do about it. Of a LoRA run, the policy cannot see the dtype, so it is compared here."""
        advice = _ADVICE.get(reason, "")
        info = self.info
        differ = kind is WeightsKind.LORA and self._dtype and info.dtype not in ("", self._dtype)
        if reason is Reason.CANARY_FAILED and differ:
            return f"the dtypes differ: the policy computes in {info.dtype}, this run in {self._dtype}; {advice}"
        if reason is Reason.MODEL_MISMATCH:
            serves = await self._policy.info(self._name)
            return _ANOTHER_MODEL if serves.fingerprint != info.fingerprint else ""
        return advice

    def _foreign(self, version: int) -> ForeignWeights:
        return ForeignWeights(
            f"the policy serves version {version}, but this run published {self.version}: another run or an "
            "administrator updates the same policy, or gave it another model"
        )


def _advised(error: DomainError, advice: str) -> DomainError:
    message = f"{error.message.rstrip('.')}: {advice}" if advice else error.message
    return error.told(message)
