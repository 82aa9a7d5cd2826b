"""One named policy: its calls, its sessions, and the deployments that replace each other when a model is loaded.

A session is an episode: it finishes on the deployment that it began with, whatever is loaded meanwhile. A replaced
deployment is closed when no call is in flight and none of its sessions has asked for a while.

A policy is in these states. Opening and closing may take minutes, so they hold no lock.

    state      since                              calls             changes of weights   LoadModel    UnloadModel
    opening    LoadModel or the start: its first  UNKNOWN_POLICY    UNKNOWN_POLICY       waits        UNKNOWN_POLICY
               model is being opened
    serving    a model serves                     answered          one at a time        → replacing  → closing
    replacing  LoadModel: another model is being  answered, by the  one at a time, of    waits        waits
               opened beside the one that serves  one that serves   the one that serves
    closing    UnloadModel: the last calls        those that came   those that came      waits        UNKNOWN_POLICY
               finish, the models are closed      before finish     before finish
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TypeVar, cast

import structlog
from cachetools import LRUCache

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import (
    CallOptions,
    Completion,
    CompletionPart,
    Continuation,
    Feature,
    Message,
    PolicyInfo,
    PolicyState,
    PolicyVersion,
    Prompt,
    SamplingParams,
    VersionSpan,
)
from mulligan.common.tasks import cancel, gather_or_cancel
from mulligan.common.tracing import Span, span
from mulligan.policy import preflight
from mulligan.policy.backend import Ask, Backend, Sampled, Scored
from mulligan.policy.config import PolicySettings
from mulligan.policy.deployment import Deployment
from mulligan.policy.factory import OpenBackend
from mulligan.policy.model_settings import ModelSettings
from mulligan.policy.prompts import BESIDE, check_size, generated_ids, size_of, tokenized_ids
from mulligan.policy.streams import TextStream, merged, unsettling_token
from mulligan.policy.uploads import UploadHeader, Uploads
from mulligan.policy.version_table import DamagedTable
from mulligan.policy.versions import VersionStore, source_of

log = structlog.get_logger()
T = TypeVar("T")
_MANY_TOKENS = 2**17  # of a Score: more are checked in a thread
_MOST_SESSIONS = 65_536  # those that asked longest ago are forgotten, and begin anew when they ask again
_LOOK_SECONDS = 0.05
_PLAIN = CallOptions()


class Policy:
    """`load` comes before anything else. Calls raise DomainError as those of PolicyService do.

    A call takes the deployment of its session (`_use`), is checked (`preflight`), becomes an `Ask` of token ids, waits
    until the deployment lets it pass (`serving`), asks the engine, and is answered when the weights that sampled it
    have passed their check (`verified`); otherwise it samples again.

    A change of weights (`change`), and the moment when a model that was opened replaces another (`load`), hold the one
    lock. `Policies` sees to it that a caller who leaves does not stop one, and that one model is opened at a time.
    """

    def __init__(self, name: str, service: PolicySettings, folder: Path | None, create: OpenBackend, uploads: Uploads):
        self.name = name
        self.opening: ModelSettings | None = None  # of the model that is being opened
        self.closing = False
        self._service = service
        self._folder = folder  # of its versions
        self._store: VersionStore | None = None  # opened by the first `load`
        self._create = create
        self._uploads = uploads
        self._changing = asyncio.Lock()
        self._newest: Deployment | None = None
        self._draining: list[Deployment] = []
        self._drains: set[asyncio.Task[None]] = set()
        self._sessions: LRUCache[str, Deployment] = LRUCache(_MOST_SESSIONS)
        self._computed = 0.0  # seconds, in deployments that are closed

    @property
    def serving(self) -> bool:
        """Whether calls and changes may come: a model is loaded, and the policy is not closing."""
        return self._newest is not None and not self.closing

    @property
    def newest(self) -> Deployment:
        assert self._newest is not None, "nothing was loaded yet"
        return self._newest

    @property
    def deployments(self) -> list[Deployment]:
        return [*self._draining, self._newest] if self._newest is not None else list(self._draining)

    @property
    def settings(self) -> list[ModelSettings]:
        """Of all its models, also of one that is being opened."""
        opening = [self.opening] if self.opening is not None else []
        return [*opening, *(deployment.settings for deployment in self.deployments)]

    @property
    def info(self) -> PolicyInfo:
        deployment = self.newest
        model = deployment.backend.model
        computed = sum(each.backend.compute_seconds for each in self.deployments)
        return PolicyInfo(
            model=model.model,
            fingerprint=model.fingerprint,
            policy_version=deployment.policy_version,
            context_length=model.context_length,
            vocabulary_size=model.vocabulary_size,
            end_of_turn_token_ids=model.end_of_turn_token_ids,
            rewrites_history=model.rewrites_history,
            deterministic=model.deterministic,
            compute_seconds=self._computed + computed,
            name=self.name,
            backend=deployment.settings.backend,
            features=model.features,
            adapters=model.adapters,
            state=deployment.state,
            problem=deployment.problem,
            frozen=deployment.settings.frozen,
            replicas=tuple(replica.info for replica in deployment.backend.replicas),
            draining_models=len(self._draining),
            dtype=model.dtype,
            canary_tolerance=deployment.canary_tolerance,
            lora=model.lora,
            sparse_uploads=Feature.FULL_WEIGHTS in model.features,
        )

    async def versions(self, below: int | None, limit: int) -> tuple[PolicyVersion, ...]:
        """Of all its models, newest first, those less than `below`."""
        assert self._store is not None
        return await asyncio.to_thread(self._store.versions, below, limit)

    async def receive_weights(self, header: UploadHeader, chunks: AsyncIterator[bytes]) -> str:
        """The URI of what was uploaded. A sparse file builds on a version that this policy keeps. Raises DomainError as
        PolicyAdminService.UploadWeights does."""
        assert self._store is not None
        return await self._uploads.receive(header, chunks, self._store.open_full)

    # Calls

    async def generate(self, prompt: Prompt, sampling: SamplingParams, options: CallOptions = _PLAIN) -> Completion:
        with self._use(options.session_id) as deployment:
            ask, added = await _ask(deployment, prompt, sampling, options)
            async with deployment.sampling(1, options.min_policy_version, options.version_wait):
                sampled = await _sample(deployment, ask, options)
                return _completion(deployment.backend, prompt, added, sampled)

    async def sample(
        self, prompt: Prompt, sampling: SamplingParams, n: int = 1, options: CallOptions = _PLAIN
    ) -> tuple[Completion, ...]:
        """When one sample fails, all do."""
        if n == 1:
            return (await self.generate(prompt, sampling, options),)
        preflight.check_samples(n, sampling)
        with self._use(options.session_id) as deployment:
            ask, added = await _ask(deployment, prompt, sampling, options, n)
            async with deployment.sampling(n, options.min_policy_version, options.version_wait):
                sampled = await gather_or_cancel(_sample(deployment, each, options) for each in _asks(ask, n))
                return tuple(_completion(deployment.backend, prompt, added, each) for each in sampled)

    async def stream(
        self, prompt: Prompt, sampling: SamplingParams, n: int = 1, options: CallOptions = _PLAIN
    ) -> AsyncGenerator[CompletionPart, None]:
        """Closing it stops the engine's work. Raises CANARY_FAILED when weights that came under way are refused."""
        preflight.check_samples(n, sampling)
        with self._use(options.session_id) as deployment:
            preflight.check_stream(deployment.backend.model)
            ask, added = await _ask(deployment, prompt, sampling, options, n)
            async with deployment.sampling(n, options.min_policy_version, options.version_wait):
                text = _text_streams(deployment.backend, prompt)
                streams = [_parts(deployment, each, index, text) for index, each in enumerate(_asks(ask, n))]
                async with aclosing(streams[0] if n == 1 else merged(streams)) as parts:
                    async for part in parts:
                        _check_versions(part.policy_versions, options)
                        yield replace(part, prompt_token_ids=added) if added else part
                        added = ()

    async def score(
        self, sequences: Sequence[Sequence[int]], temperature: float = 1.0, options: CallOptions = _PLAIN
    ) -> Scored:
        """The sequences may be fields of a message: nothing here copies them."""
        with self._use() as deployment:
            check = partial(preflight.check_score, sequences, temperature, options.adapter, deployment.backend.model)
            await BESIDE.run(check) if sum(map(len, sequences)) > _MANY_TOKENS else check()
            async with deployment.serving(options.min_policy_version, options.version_wait):
                while True:
                    scored = await deployment.backend.score(sequences, temperature, options.adapter)
                    span = VersionSpan(scored.policy_version, 0)
                    if await deployment.verified((span,)):
                        _check_versions((span,), options)
                        return scored

    async def tokenize(self, prompt: Prompt | str, options: CallOptions = _PLAIN) -> tuple[int, ...]:
        """What `generate` would report as prompt_token_ids. A string is encoded without the chat template."""
        with self._use(options.session_id) as deployment:
            preflight.check_tokenize(prompt, options, deployment.backend.model)
            return await tokenized_ids(deployment.backend, prompt, options.tools)

    def check_count(self, kind: str, count: int, session_id: str) -> None:
        """Before anything is made of the token ids of a prompt. `kind` is its name in the contract. Raises DomainError
        UNSUPPORTED_OPTION if the engine takes none, and PROMPT_TOO_LONG if they leave no room for a sampled one."""
        found = self._sessions.get(session_id)
        model = (self.newest if found is None or found.closed else found).backend.model
        preflight.check_kind(kind, model)
        preflight.check_count("prompt", count, model, model.context_length - 1)

    # Changes

    async def change(self, work: Callable[[Deployment], Awaitable[T]]) -> T:
        """`work` changes the weights of the newest deployment, and nothing else changes them meanwhile. Raises
        DomainError UNKNOWN_POLICY if the policy was closed before its turn came."""
        async with self._changing:
            if self.newest.closed:
                raise DomainError(Reason.UNKNOWN_POLICY, f"the policy {self.name} was unloaded", policy=self.name)
            return await work(self.newest)

    async def load(
        self, settings: ModelSettings, commit: Callable[[], None] = lambda: None, *, restore: bool = False
    ) -> None:
        """Opens a model and, once it serves, sends new calls and sessions to it. `commit` makes that last. With
        `restore` it serves the version that it served before a restart.

        Raises UnsupportedModel, DomainError or OSError; then all is as it was.
        """
        self.opening = settings
        try:
            await self._load(settings, commit, restore)
        finally:
            self.opening = None

    def serves(self, settings: ModelSettings) -> bool:
        """Whether these are the settings of the newest deployment, and it answers."""
        return self.newest.settings == settings and self.newest.state is not PolicyState.REFUSED

    async def finished(self) -> None:
        """Returns when no call is in flight. No new one may come: those that wait for released memory fail with
        UNKNOWN_POLICY, because nobody can resume it any more."""
        for deployment in self.deployments:
            deployment.expect_no_resume()
        while any(deployment.calls for deployment in self.deployments):  # noqa: ASYNC110 - once in a policy's life
            await asyncio.sleep(_LOOK_SECONDS)

    async def close(self) -> None:
        """Waits for the change that is under way. Calls in flight fail. Called again, it closes what it had not yet
        closed when it was cancelled."""
        self.closing = True
        async with self._changing:
            await cancel(*self._drains)
            results = await asyncio.gather(*map(self._close, self.deployments), return_exceptions=True)
            if self._store is not None:
                await asyncio.to_thread(self._store.close)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    # Deployments and their sessions

    @contextmanager
    def _use(self, session_id: str = "") -> Iterator[Deployment]:
        """The deployment that answers a call of this session."""
        deployment = self._choose(session_id) if session_id else self.newest
        deployment.calls += 1
        try:
            yield deployment
        finally:
            deployment.calls -= 1
            if session_id:
                deployment.last_asked = monotonic()

    def _choose(self, session_id: str) -> Deployment:
        deployment = self._sessions.get(session_id)
        if deployment is None or deployment.closed:
            deployment = self._sessions[session_id] = self.newest
        return deployment

    async def _load(self, settings: ModelSettings, commit: Callable[[], None], restore: bool) -> None:
        self._refuse_released()
        if self._store is None:
            try:
                self._store = await asyncio.to_thread(VersionStore, self._folder, self._service.keep_versions)
            except DamagedTable as error:
                raise DomainError(
                    Reason.STATE_DAMAGED, str(error), file=(self._folder or Path()) / "versions.db"
                ) from error
        store = self._store
        folder = await asyncio.to_thread(store.engine_folder)
        async with AsyncExitStack() as undo:
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
            version = await asyncio.to_thread(store.first_version, source_of(settings) if restore else None)
            backend = await self._create(settings, folder, version)
            undo.push_async_callback(backend.close)
            deployment = Deployment(self.name, settings, self._service, backend, store, folder, self._uploads)
            async with self._changing:
                self._refuse_released()
                await deployment.start(commit)
                undo.pop_all()
                self._replace(deployment)

    def _refuse_released(self) -> None:
        if self._newest is not None:
            self._newest.refuse_released()

    def _replace(self, deployment: Deployment) -> None:
        old = self._newest
        self._newest = deployment
        if old is not None:
            self._draining.append(old)
            task = asyncio.create_task(self._drain(old))
            self._drains.add(task)
            task.add_done_callback(self._drains.discard)

    async def _drain(self, old: Deployment) -> None:
        idle = self._service.session_idle_seconds
        while old.calls or monotonic() - old.last_asked < idle:  # noqa: ASYNC110 - time must pass as well
            await asyncio.sleep(_LOOK_SECONDS)
        try:
            await self._close(old)
        except Exception:
            log.exception("a replaced model did not close", policy=self.name)
        else:
            log.info("a replaced model is closed", policy=self.name, model=old.backend.model.model)
        self._draining.remove(old)  # not before: until it is closed, its servers are its own
        self._computed += old.backend.compute_seconds

    async def _close(self, deployment: Deployment) -> None:
        deployment.closed = True  # whatever session asks now begins anew
        for session in [session for session, used in self._sessions.items() if used is deployment]:
            del self._sessions[session]
        await deployment.close()
        await asyncio.to_thread(shutil.rmtree, deployment.folder, ignore_errors=True)


async def _ask(
    deployment: Deployment, prompt: Prompt, sampling: SamplingParams, options: CallOptions, count: int = 1
) -> tuple[Ask, tuple[int, ...]]:
    """The request to the engine for `count` samples, checked, and the token ids of its prompt that the caller does not
    have yet."""
    backend = deployment.backend
    model = backend.model
    preflight.check_sampling(sampling, model)
    preflight.check_options(options, model)
    preflight.check_prompt(prompt, options, model)
    deployment.refuse_full(count)  # before anything is rendered for it
    token_ids: list[int] = []
    messages: tuple[Message, ...] = ()
    added: tuple[int, ...] = ()
    if Feature.TOKEN_IDS not in model.features:
        assert isinstance(prompt, tuple)
        messages = prompt
        check_size("prompt", backend, size_of(prompt, options.tools), max(model.context_length - 1, 0))
    else:
        added = await generated_ids(backend, prompt, options.tools)
        held = prompt if isinstance(prompt, list) else prompt.token_ids if isinstance(prompt, Continuation) else ()
        token_ids = [*held, *added]
        preflight.check_tokens("prompt", token_ids, model, model.context_length - 1)
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
    return ask, added


def _asks(ask: Ask, count: int) -> list[Ask]:
    """One for each sample. The first is `ask` itself, the others have seeds derived from its seed."""
    return [ask, *(replace(ask, sampling=_derived(ask.sampling, index)) for index in range(1, count))]


def _derived(sampling: SamplingParams, index: int) -> SamplingParams:
    if sampling.seed is None:
        return sampling
    digest = hashlib.sha256(f"{sampling.seed}:{index}".encode()).digest()
    return replace(sampling, seed=int.from_bytes(digest[:8], "big") >> 1)  # seeds are signed


async def _sample(deployment: Deployment, ask: Ask, options: CallOptions) -> Sampled:
    while True:
        with span("engine.generate", policy=deployment.name, backend=deployment.settings.backend) as engine:
            sampled = await deployment.backend.generate(ask)
            engine.set(prompt_tokens=len(ask.token_ids), sampled_tokens=len(sampled.token_ids))
        if await deployment.verified(sampled.policy_versions):
            _check_versions(sampled.policy_versions, options)
            return sampled


def _check_versions(spans: Sequence[VersionSpan], options: CallOptions) -> None:
    """A rollback during the call may have brought a version that is older than the call asked for."""
    oldest = min((span.policy_version for span in spans), default=None)
    wanted = options.min_policy_version
    if oldest is not None and wanted is not None and oldest < wanted:
        raise DomainError(
            Reason.POLICY_VERSION_TOO_OLD,
            f"the policy went back to version {oldest} under way; at least {wanted} was asked for",
            policy_version=oldest,
        )


def _completion(backend: Backend, prompt: Prompt, added: tuple[int, ...], sampled: Sampled) -> Completion:
    assert sampled.stop_reason is not None
    text = backend.decode(sampled.token_ids) if sampled.token_ids else sampled.text
    return Completion(
        prompt_token_ids=added,
        token_ids=sampled.token_ids,
        log_probs=sampled.log_probs,
        text=text,
        stop_reason=sampled.stop_reason,
        policy_versions=sampled.policy_versions,
        raw_text=_raw_text(backend, prompt, sampled.token_ids, text),
    )


def _raw_text(backend: Backend, prompt: Prompt, token_ids: Sequence[int], text: str) -> str:
    """ "" if it equals `text`."""
    begun = backend.chat.begun_thought if backend.chat is not None and not isinstance(prompt, list) else ""
    raw = begun + (backend.decode_marked(token_ids, text) if token_ids else text)
    return raw if raw != text else ""


def _text_streams(backend: Backend, prompt: Prompt) -> Callable[[], TextStream] | None:
    """None if the engine answers text."""
    if Feature.TOKEN_IDS not in backend.model.features:
        return None
    raw = partial(_raw_text, backend, prompt)
    return partial(TextStream, backend.decode, unsettling_token(backend.encode, backend.decode), raw)


async def _parts(
    deployment: Deployment, ask: Ask, index: int, new_text: Callable[[], TextStream] | None
) -> AsyncGenerator[CompletionPart, None]:
    """One sample. If its weights are refused before the first part was yielded, it starts again."""
    backend = deployment.backend
    while True:
        text = new_text() if new_text is not None else None
        given = False
        # Never the current span: between two parts, what is current is the caller's.
        engine = span("engine.stream", policy=deployment.name, backend=deployment.settings.backend)
        async with aclosing(_closable(backend.stream(ask))) as stream, _ended(engine):
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


@asynccontextmanager
async def _ended(engine: Span) -> AsyncIterator[None]:
    try:
        yield
    finally:
        engine.end()


def _closable(stream: AsyncIterator[Sampled]) -> AsyncGenerator[Sampled, None]:
    """What backends return can be closed, as `Backend.stream` says."""
    return cast("AsyncGenerator[Sampled, None]", stream)
