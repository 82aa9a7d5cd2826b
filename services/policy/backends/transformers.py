"""Any causal language model that transformers can load, on a CPU or one GPU, with an engine of our own.

transformers' own continuous batching needs a GPU to be fast; see engine.py, runner.py and attention.py.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError

from services.common.fingerprint import model_fingerprint
from services.common.types import PolicyInfo, SamplingParams
from services.policy.backend import Sampled, Scored, UnsupportedModel, WeightsFile
from services.policy.backends.attention import SlotCache
from services.policy.backends.engine import Engine
from services.policy.backends.model import Model
from services.policy.backends.runner import Request, Runner
from services.policy.backends.weights import Weights
from services.policy.chat import Chat, TemplateFailure
from services.policy.config import PolicySettings


class TransformersBackend:
    """Create it on the event loop that will call it. Raises UnsupportedModel."""

    def __init__(self, settings: PolicySettings):
        torch.set_num_threads(1 if settings.deterministic else settings.threads or max(1, torch.get_num_threads() // 2))
        self._model = Model(settings)
        self._tokenizer = self._model.tokenizer
        self._name = settings.model
        self._deterministic = settings.deterministic
        self._fingerprint = model_fingerprint(self._model.module, self._tokenizer)
        self._end_of_turn = self._end_of_turn_tokens()
        self._chat = Chat(self._template if self._tokenizer.chat_template else None, self.encode, self._end_of_turn)
        self._runner = self._create_runner(settings)
        self._engine = Engine(
            self._runner,
            max_batch=1 if settings.deterministic else min(settings.max_batch, self._slots),
            max_queue=settings.max_queue,
            batch_wait=0 if settings.deterministic else settings.batch_wait_ms / 1000,
        )
        self._weights = Weights(self._model.module, self._model.load_weights)
        self._serving_sha256: str | None = None

    def _create_runner(self, settings: PolicySettings) -> Runner:
        model = self._model
        dtype = model.dtype or torch.float32
        size = SlotCache.bytes_per_slot(model.layers, model.context_length, dtype)
        wanted = 1 if settings.deterministic else settings.slots
        self._slots = min(wanted, int(settings.cache_gib * 2**30 // size))
        if self._slots < 1:
            raise UnsupportedModel(
                f"one conversation of {model.context_length} tokens needs {size / 2**30:.1f} GiB of cache: "
                "raise cache_gib or lower context_length"
            )
        return Runner(
            model.forward,
            SlotCache(model.layers, self._slots, model.context_length, dtype, model.device),
            model.device,
            self._end_of_turn,
            lambda ids: str(self._tokenizer.decode(ids, skip_special_tokens=False)),
            reuse_prefixes=not settings.deterministic,
            tokens_per_pass=model.context_length if settings.deterministic else settings.tokens_per_pass,
        )

    def _end_of_turn_tokens(self) -> tuple[int, ...]:
        """What the model's generation settings, its configuration or its tokenizer call the end of a turn."""
        found: set[int] = set()
        sources: list[Any] = [self._model.module.generation_config, self._model.config, self._tokenizer]
        for source in sources:
            value = getattr(source, "eos_token_id", None)
            found |= {value} if isinstance(value, int) else set(value or ())
        return tuple(sorted(found))

    def _template(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise TemplateFailure(str(error)) from error
        return str(text)

    @property
    def info(self) -> PolicyInfo:
        return PolicyInfo(
            model=self._name,
            fingerprint=self._fingerprint,
            policy_version=self._runner.version,
            context_length=self._model.context_length,
            vocabulary_size=self._model.vocabulary_size,
            end_of_turn_token_ids=self._end_of_turn,
            rewrites_history=self._chat.rewrites_history,
            deterministic=self._deterministic,
            compute_seconds=self._engine.compute_seconds,
        )

    @property
    def chat(self) -> Chat:
        return self._chat

    @property
    def serving_sha256(self) -> str | None:
        return self._serving_sha256

    @property
    def pending(self) -> int:
        """Requests that run or wait."""
        return self._engine.pending

    def encode(self, text: str) -> list[int]:
        # The tokenizer itself: transformers' wrapper takes five times as long, and is not made for several threads.
        ids: list[int] = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))

    async def generate(self, token_ids: Sequence[int], sampling: SamplingParams) -> Sampled:
        seed = random.getrandbits(63) if sampling.seed is None else sampling.seed
        return await self._engine.generate(Request(token_ids, sampling, seed))

    async def score(self, sequences: Sequence[Sequence[int]], temperature: float) -> Scored:
        if not sequences:
            return Scored((), self._runner.version)
        steps = ((rows, self._runner.version) for rows in self._model.score(sequences, temperature))
        results = await self._engine.in_steps(steps)
        return Scored(tuple(row for rows, _ in results for row in rows), results[0][1])

    async def update_weights(self, weights: WeightsFile) -> None:
        tensors = await asyncio.to_thread(self._weights.read, weights)

        def apply() -> None:
            self._weights.apply(tensors, weights.kind)
            self._runner.flush()
            self._runner.version = weights.policy_version
            self._serving_sha256 = weights.sha256

        await self._engine.exclusively(apply)

    async def close(self) -> None:
        await self._engine.close()
