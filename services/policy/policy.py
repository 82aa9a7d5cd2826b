"""One named policy, in domain types: checks, prompts and answers around its models."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import cast

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import (
    CallOptions,
    Completion,
    CompletionPart,
    Continuation,
    Feature,
    Message,
    PolicyInfo,
    Prompt,
    SamplingParams,
    Tool,
    VersionSpan,
)
from mulligan.policy import checks
from mulligan.policy.backend import Ask, Backend, Sampled, Scored
from mulligan.policy.deployment import Deployment
from mulligan.policy.models import Models
from mulligan.policy.streams import TextStream, merged, together, unsettling_token

# Longer texts are rendered and encoded in a thread, so that other calls do not wait for them.
_LONG_TEXT = 20_000
_PLAIN = CallOptions()


class Policy:
    """Calls raise DomainError as those of PolicyService do. `options.policy` is of no account here."""

    def __init__(self, models: Models):
        self.name = models.name
        self.models = models

    @property
    def info(self) -> PolicyInfo:
        deployment = self.models.newest.deployment
        model = deployment.backend.model
        return PolicyInfo(
            model=model.model,
            fingerprint=model.fingerprint,
            policy_version=deployment.policy_version,
            context_length=model.context_length,
            vocabulary_size=model.vocabulary_size,
            end_of_turn_token_ids=model.end_of_turn_token_ids,
            rewrites_history=model.rewrites_history,
            deterministic=model.deterministic,
            compute_seconds=self.models.compute_seconds,
            name=self.name,
            backend=deployment.settings.backend,
            features=model.features,
            adapters=model.adapters,
            state=deployment.state,
            problem=deployment.problem,
            frozen=deployment.settings.frozen,
            replicas=tuple(replica.info for replica in deployment.backend.replicas),
            draining_models=len(self.models.draining),
            dtype=model.dtype,
            canary_tolerance=deployment.canary_tolerance,
            lora=model.lora,
        )

    async def generate(self, prompt: Prompt, sampling: SamplingParams, options: CallOptions = _PLAIN) -> Completion:
        with self.models.use(options.session_id) as model:
            deployment = model.deployment
            ask, shown = await _ask(deployment.backend, prompt, sampling, options)
            async with deployment.serving(options.min_policy_version, options.version_wait):
                sampled = await _sample(deployment, ask, options)
                return _completion(deployment.backend, prompt, shown, sampled)

    async def sample(
        self, prompt: Prompt, sampling: SamplingParams, n: int = 1, options: CallOptions = _PLAIN
    ) -> tuple[Completion, ...]:
        """When one sample fails, all do."""
        if n == 1:
            return (await self.generate(prompt, sampling, options),)
        checks.check_samples(n, sampling)
        with self.models.use(options.session_id) as model:
            deployment = model.deployment
            ask, shown = await _ask(deployment.backend, prompt, sampling, options)
            async with deployment.serving(options.min_policy_version, options.version_wait):
                sampled = await together(_sample(deployment, each, options) for each in _asks(ask, n))
                return tuple(_completion(deployment.backend, prompt, shown, each) for each in sampled)

    async def stream(
        self, prompt: Prompt, sampling: SamplingParams, n: int = 1, options: CallOptions = _PLAIN
    ) -> AsyncGenerator[CompletionPart, None]:
        """Closing it stops the engine's work. Raises CANARY_FAILED when weights that came under way are refused."""
        checks.check_samples(n, sampling)
        with self.models.use(options.session_id) as model:
            deployment = model.deployment
            checks.need_stream(deployment.backend.model)
            ask, shown = await _ask(deployment.backend, prompt, sampling, options)
            async with deployment.serving(options.min_policy_version, options.version_wait):
                text = _text_streams(deployment.backend, prompt)
                streams = [_parts(deployment, each, index, text) for index, each in enumerate(_asks(ask, n))]
                async with aclosing(streams[0] if n == 1 else merged(streams)) as parts:
                    async for part in parts:
                        _check_versions(part.policy_versions, options)
                        yield replace(part, prompt_token_ids=shown) if shown else part
                        shown = ()

    async def score(
        self, sequences: Sequence[Sequence[int]], temperature: float = 1.0, options: CallOptions = _PLAIN
    ) -> Scored:
        with self.models.use() as model:
            deployment = model.deployment
            checks.check_score(sequences, temperature, options.adapter, deployment.backend.model)
            async with deployment.serving(options.min_policy_version, options.version_wait):
                while True:
                    scored = await deployment.backend.score(sequences, temperature, options.adapter)
                    span = VersionSpan(scored.policy_version, 0)
                    if await deployment.verified((span,)):
                        _check_versions((span,), options)
                        return scored

    async def tokenize(self, prompt: Prompt | str, options: CallOptions = _PLAIN) -> tuple[int, ...]:
        """What `generate` would report as prompt_token_ids; a string is encoded without template."""
        with self.models.use(options.session_id) as model:
            backend = model.deployment.backend
            checks.check_tokenize(prompt, options, backend.model)
            if not isinstance(prompt, str):
                return await _shown(backend, prompt, options.tools)
            encode = backend.encode
            return tuple(await asyncio.to_thread(encode, prompt) if len(prompt) > _LONG_TEXT else encode(prompt))


async def _ask(
    backend: Backend, prompt: Prompt, sampling: SamplingParams, options: CallOptions
) -> tuple[Ask, tuple[int, ...]]:
    """What the engine is asked, checked, and the token ids of it that the caller does not have."""
    model = backend.model
    checks.check_sampling(sampling, model)
    checks.check_options(options, model)
    checks.check_prompt(prompt, options, model)
    token_ids: list[int] = []
    messages: tuple[Message, ...] = ()
    shown: tuple[int, ...] = ()
    if Feature.TOKEN_IDS not in model.features:
        assert isinstance(prompt, tuple)
        messages = prompt
    else:
        shown = await _shown(backend, prompt, options.tools)
        held = prompt if isinstance(prompt, list) else prompt.token_ids if isinstance(prompt, Continuation) else ()
        token_ids = [*held, *shown]
        checks.check_tokens("prompt", token_ids, model, model.context_length - 1)
    ask = Ask(
        token_ids,
        sampling,
        messages,
        options.tools if messages else (),
        options.session_id,
        options.priority,
        options.adapter,
        options.request_id,
    )
    return ask, shown


async def _shown(backend: Backend, prompt: Prompt, tools: tuple[Tool, ...]) -> tuple[int, ...]:
    """The token ids that this service adds to a prompt."""
    chat = backend.chat
    if isinstance(prompt, list):
        return ()
    assert chat is not None
    messages = prompt.messages if isinstance(prompt, Continuation) else prompt
    long = sum(len(message.content) for message in messages) > _LONG_TEXT
    if isinstance(prompt, Continuation):
        return await asyncio.to_thread(chat.extend, prompt) if long else chat.extend(prompt)
    return await asyncio.to_thread(chat.render, prompt, tools) if long else chat.render(prompt, tools)


def _asks(ask: Ask, count: int) -> list[Ask]:
    """One for each sample; the first is the given one."""
    return [ask, *(replace(ask, sampling=_derived(ask.sampling, index)) for index in range(1, count))]


def _derived(sampling: SamplingParams, index: int) -> SamplingParams:
    if sampling.seed is None:
        return sampling
    digest = hashlib.sha256(f"{sampling.seed}:{index}".encode()).digest()
    return replace(sampling, seed=int.from_bytes(digest[:8], "big") >> 1)  # seeds are signed


async def _sample(deployment: Deployment, ask: Ask, options: CallOptions) -> Sampled:
    while True:
        sampled = await deployment.backend.generate(ask)
        if await deployment.verified(sampled.policy_versions):
            _check_versions(sampled.policy_versions, options)
            return sampled


def _check_versions(spans: Sequence[VersionSpan], options: CallOptions) -> None:
    """A rollback while a call is under way can bring a version that the call must not be answered by."""
    oldest = min((span.policy_version for span in spans), default=None)
    wanted = options.min_policy_version
    if oldest is not None and wanted is not None and oldest < wanted:
        raise DomainError(
            Reason.POLICY_VERSION_TOO_OLD,
            f"the policy went back to version {oldest} under way; at least {wanted} was asked for",
            policy_version=oldest,
        )


def _completion(backend: Backend, prompt: Prompt, shown: tuple[int, ...], sampled: Sampled) -> Completion:
    assert sampled.stop_reason is not None
    text = backend.decode(sampled.token_ids) if sampled.token_ids else sampled.text
    return Completion(
        prompt_token_ids=shown,
        token_ids=sampled.token_ids,
        log_probs=sampled.log_probs,
        text=text,
        stop_reason=sampled.stop_reason,
        policy_versions=sampled.policy_versions,
        raw_text=_raw_text(backend, prompt, sampled.token_ids, text),
    )


def _raw_text(backend: Backend, prompt: Prompt, token_ids: Sequence[int], text: str) -> str:
    """Empty where it equals `text`."""
    begun = backend.chat.begun_thought if backend.chat is not None and not isinstance(prompt, list) else ""
    raw = begun + (backend.decode_marked(token_ids, text) if token_ids else text)
    return raw if raw != text else ""


def _text_streams(backend: Backend, prompt: Prompt) -> Callable[[], TextStream] | None:
    """None where engines answer text."""
    if Feature.TOKEN_IDS not in backend.model.features:
        return None
    raw = partial(_raw_text, backend, prompt)
    return partial(TextStream, backend.decode, unsettling_token(backend.encode, backend.decode), raw)


async def _parts(
    deployment: Deployment, ask: Ask, index: int, new_text: Callable[[], TextStream] | None
) -> AsyncGenerator[CompletionPart, None]:
    """One sample. It begins anew while nothing has been given out."""
    backend = deployment.backend
    while True:
        text = new_text() if new_text is not None else None
        given = False
        async with aclosing(_closable(backend.stream(ask))) as stream:
            async for sampled in stream:
                if not await deployment.verified(sampled.policy_versions):
                    break
                last = sampled.stop_reason is not None
                new = text.push(sampled.token_ids, last=last) if text is not None else sampled.text
                yield CompletionPart(
                    index=index,
                    prompt_token_ids=(),
                    token_ids=sampled.token_ids,
                    log_probs=sampled.log_probs,
                    text=new,
                    policy_versions=sampled.policy_versions,
                    stop_reason=sampled.stop_reason,
                    raw_text=text.raw() if text is not None and last else "",
                )
                given = True
            else:
                return
        if given:
            raise DomainError(
                Reason.CANARY_FAILED, "the weights changed under way, and the new ones were refused: ask again"
            )


def _closable(stream: AsyncIterator[Sampled]) -> AsyncGenerator[Sampled, None]:
    """What backends return can be closed, as `Backend.stream` says."""
    return cast("AsyncGenerator[Sampled, None]", stream)
