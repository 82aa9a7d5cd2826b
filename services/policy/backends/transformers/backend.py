"""Any causal language model that transformers can load, on a CPU or one GPU, with an engine of our own.

transformers' own continuous batching needs a GPU to be fast; see engine.py, runner.py and attention.py.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, suppress
from functools import partial
from typing import Any

import torch

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import Feature, ReplicaInfo
from mulligan.common.model_files import UnsupportedModel
from mulligan.common.work_threads import WorkThreads
from mulligan.policy.backend import Admission, Ask, ModelInfo, Replica, Sampled, Scored, WeightsFile
from mulligan.policy.backends.transformers import Settings
from mulligan.policy.backends.transformers.attention import SlotCache
from mulligan.policy.backends.transformers.constraints import Constraints
from mulligan.policy.backends.transformers.engine import Engine
from mulligan.policy.backends.transformers.model import Model
from mulligan.policy.backends.transformers.runner import Request, Runner
from mulligan.policy.backends.transformers.weights import Weights
from mulligan.policy.chat import Chat
from mulligan.policy.model_settings import ModelSettings

# Of the process when it starts: what an engine's thread is told changes what torch answers later.
_CORES = torch.get_num_threads()
# Slots of a cache on a CPU for each conversation of the whole context that fits: most are shorter, and take up memory
# for their own tokens alone.
_SHORTER = 16
# Compiles what constrains samples, which takes seconds where a caller wants it to: only constrained samples wait for
# these threads.
_GRAMMARS = WorkThreads(2, "policy-grammars")
_FEATURES = frozenset(
    [
        Feature.TOKEN_IDS,
        Feature.LOG_PROBS,
        Feature.SCORE,
        Feature.SCORE_TEMPERATURE,
        Feature.STREAM,
        Feature.TOP_K,
        Feature.SEED,
        Feature.STOP_TOKEN_IDS,
        Feature.PRIORITY,
        Feature.FULL_WEIGHTS,
        Feature.LORA_WEIGHTS,
    ]
)


async def open_backend(settings: ModelSettings, first_version: int) -> TransformersBackend:
    """Raises UnsupportedModel."""
    loaded = await asyncio.to_thread(_Loaded, settings)
    return TransformersBackend(settings, loaded, first_version)


class _Loaded:
    """The model and its cache. Loading takes long and needs no event loop, so it can run in a thread."""

    def __init__(self, settings: ModelSettings):
        if settings.adapters:
            raise UnsupportedModel("adapters: the transformers backend serves no fixed adapters")
        own = settings.own_as(Settings)
        self.model = Model(settings)
        layers = self.model.layers
        capacity = self.model.context_length
        dtype = self.model.dtype
        size = SlotCache.bytes_per_token(layers, dtype)
        room = int(own.cache_gib * 2**30 // size)
        whole = room // capacity  # conversations that have the whole context
        if whole < 1:
            raise UnsupportedModel(
                f"one conversation of {capacity} tokens needs {capacity * size / 2**30:.1f} GiB of cache: "
                "raise cache_gib or lower context_length"
            )
        most = 1 if own.deterministic else own.slots
        create = partial(SlotCache, layers, capacity=capacity, dtype=dtype, device=self.model.device, room=room)
        cache: SlotCache | None = None
        with suppress(OSError):  # where the system promises no more memory than it has (vm.overcommit_memory 2)
            cache = create(slots=min(most, whole * (_SHORTER if self.model.device.type == "cpu" else 1)))
        try:
            self.cache = cache or create(slots=min(most, whole))
        except OSError as error:
            raise UnsupportedModel(f"cache_gib: {own.cache_gib} GiB cannot be had: {error.strerror}") from error
        tokenizer = self.model.tokenizer
        module = self.model.module
        self.end_of_turn = tokenizer.end_of_turn(self.model.config, module.generation_config)
        self.constraints: Constraints | None = None
        with suppress(UnsupportedModel):
            self.constraints = Constraints(tokenizer, self.model.vocabulary_size, self.end_of_turn)


class TransformersBackend:
    """Create it on the event loop that will call it. Without `loaded` it loads the model first, which blocks.

    Raises UnsupportedModel.
    """

    def __init__(self, settings: ModelSettings, loaded: _Loaded | None = None, first_version: int = 0):
        own = settings.own_as(Settings)
        loaded = loaded or _Loaded(settings)
        self._model = loaded.model
        self._cache = loaded.cache
        self._tokenizer = self._model.tokenizer
        self._constraints = loaded.constraints
        self._chat = self._tokenizer.chat(loaded.end_of_turn)
        max_batch = 1 if own.deterministic else min(own.max_batch, self._cache.slots)
        self._info = ModelInfo(
            model=settings.model_name,
            fingerprint=self._model.fingerprint,
            context_length=self._model.context_length,
            vocabulary_size=self._model.vocabulary_size,
            end_of_turn_token_ids=loaded.end_of_turn,
            rewrites_history=self._chat.rewrites_history,
            deterministic=own.deterministic,
            dtype=str(self._model.dtype).removeprefix("torch."),
            features=self._features(),
            capacity=max_batch + settings.max_queue,
        )
        self._runner = Runner(
            self._model.forward,
            self._cache,
            self._model.device,
            loaded.end_of_turn,
            lambda ids: self._tokenizer.decode(ids, special=True),
            reuse_prefixes=not own.deterministic,
            tokens_per_pass=self._model.context_length if own.deterministic else own.tokens_per_pass,
        )
        self._runner.version = first_version
        threads = 1 if own.deterministic else own.threads or max(1, _CORES // 2)
        self._engine = Engine(
            self._runner,
            max_batch=max_batch,
            max_queue=settings.max_queue,
            batch_wait=0 if own.deterministic else own.batch_wait_ms / 1000,
            prepare=lambda: torch.set_num_threads(threads),  # of the calling thread, where torch uses OpenMP
        )
        self._weights = Weights(self._model.module, self._model.load_weights)
        self._replica = _LocalReplica(self._engine, self._runner, self._model, self._weights)

    def _features(self) -> frozenset[Feature]:
        tools = {Feature.TOOLS} if self._chat.has_tools else set()
        constraints = {Feature.REGEX, Feature.JSON_SCHEMA} if self._constraints is not None else set()
        return _FEATURES | tools | constraints

    @property
    def model(self) -> ModelInfo:
        return self._info

    @property
    def policy_version(self) -> int:
        return self._runner.version

    @property
    def replicas(self) -> Sequence[Replica]:
        return (self._replica,)

    @property
    def chat(self) -> Chat:
        return self._chat

    @property
    def compute_seconds(self) -> float:
        return self._engine.compute_seconds

    @property
    def pending(self) -> int:
        """Requests that run or wait."""
        return self._engine.pending

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids)

    def decode_marked(self, token_ids: Sequence[int], text: str) -> str:
        return self._tokenizer.decode_marked(token_ids, text, self.model.end_of_turn_token_ids)

    async def generate(self, ask: Ask) -> Sampled:
        return await self._engine.generate(await self._request(ask), ask.priority)

    async def stream(self, ask: Ask) -> AsyncIterator[Sampled]:
        async with aclosing(self._engine.stream(await self._request(ask), ask.priority)) as parts:
            async for part in parts:
                yield part

    async def _request(self, ask: Ask) -> Request:
        sampling = ask.sampling
        seed = random.getrandbits(63) if sampling.seed is None else sampling.seed
        if self._constraints is None or (sampling.regex is None and sampling.json_schema is None):
            return Request(ask.token_ids, sampling, seed)
        work = partial(self._constraints.of, sampling)
        constraint = await _GRAMMARS.run(work)
        return Request(ask.token_ids, sampling, seed, constraint)

    async def score(self, sequences: Sequence[Sequence[int]], temperature: float, adapter: str = "") -> Scored:
        """`adapter` is always empty: this backend has no fixed adapters."""
        return await _score(self._engine.in_steps, self._model, self._runner, sequences, temperature)

    async def update_weights(self, weights: WeightsFile, admit: Admission) -> None:
        """Nothing is sampled from the new weights until `admit` has returned."""
        tensors = await asyncio.to_thread(self._weights.read, weights)

        def apply() -> Iterator[None]:
            self._weights.apply(tensors, weights.kind)
            self._runner.flush()
            self._runner.version = weights.policy_version
            yield

        async with self._engine.paused():
            await self._engine.urgently(apply())
            await admit(self._replica, weights)

    async def release_memory(self) -> None:
        raise _no_memory_release()

    async def resume_memory(self) -> None:
        raise _no_memory_release()

    async def close(self) -> None:
        """Frees the memory of weights and cache, even if this object is still referenced."""
        await self._engine.close()
        self._weights.close()
        self._cache.close()
        self._model.close()


class _LocalReplica:
    """The engine of this process."""

    def __init__(self, engine: Engine, runner: Runner, model: Model, weights: Weights):
        self._engine = engine
        self._runner = runner
        self._model = model
        self._weights = weights

    @property
    def info(self) -> ReplicaInfo:
        return ReplicaInfo(address="", serving=True, in_flight=self._engine.pending)

    async def score(self, sequences: Sequence[Sequence[int]], temperature: float) -> Scored:
        return await _score(self._engine.urgently, self._model, self._runner, sequences, temperature)

    async def checksum(self) -> str:
        """SHA-256 of all parameters and buffers, in lower-case hexadecimal."""
        [*_, digest] = await self._engine.urgently(self._weights.checksum())
        return digest


async def _score(
    run: Callable[[Iterator[Any]], Awaitable[list[Any]]],
    model: Model,
    runner: Runner,
    sequences: Sequence[Sequence[int]],
    temperature: float,
) -> Scored:
    if not sequences:
        return Scored((), runner.version)
    results = await run((rows, runner.version) for rows in model.score(sequences, temperature))
    return Scored(tuple(row for rows, _ in results for row in rows), results[0][1])


def _no_memory_release() -> DomainError:
    feature = Feature.MEMORY_RELEASE
    return DomainError(
        Reason.UNSUPPORTED_OPTION, "the transformers backend keeps its memory while it serves", feature=feature.value
    )
