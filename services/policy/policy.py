"""What the policy service does, in domain types: checks, prompts and answers around a backend.

It is the `PolicyPort` of a trainer in the same process; `servicer.py` puts it on the wire.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np

from services.common.errors import DomainError, Reason, invalid_field
from services.common.types import (
    Completion,
    Continuation,
    PolicyInfo,
    Prompt,
    PublishedWeights,
    SamplingParams,
    VersionSpan,
)
from services.policy.backend import Backend, Scored, WeightsFile

_LOWEST_TEMPERATURE = 1e-3  # below it, logits / temperature may exceed float32
# Longer texts are rendered and encoded in a thread, so that other calls do not wait for them.
_LONG_TEXT = 20_000


class Policy:
    """`weights_folder` is where weights may be loaded from; None: nowhere."""

    def __init__(self, backend: Backend, weights_folder: Path | None):
        self._backend = backend
        self._weights_folder = weights_folder
        self._updating = asyncio.Lock()

    async def info(self) -> PolicyInfo:
        return self._backend.info

    async def generate(
        self, prompt: Prompt, sampling: SamplingParams, *, request_id: str = "", min_policy_version: int | None = None
    ) -> Completion:
        """Raises DomainError as PolicyService.Generate does."""
        if sampling.temperature != 0:
            _check_temperature("sampling.temperature", sampling.temperature)
        self._check_version(min_policy_version)
        shown = await self._shown(prompt)
        held = prompt if isinstance(prompt, list) else prompt.token_ids if isinstance(prompt, Continuation) else ()
        token_ids = [*held, *shown]
        self._check_tokens("prompt", token_ids, self._backend.info.context_length - 1)
        sampled = await self._backend.generate(token_ids, sampling)
        return Completion(
            prompt_token_ids=shown,
            token_ids=sampled.token_ids,
            log_probs=sampled.log_probs,
            text=self._backend.decode(sampled.token_ids),
            stop_reason=sampled.stop_reason,
            policy_versions=(VersionSpan(sampled.policy_version, len(sampled.token_ids)),),
        )

    async def tokenize(self, prompt: Prompt | str) -> tuple[int, ...]:
        """What `generate` would report as prompt_token_ids; a string is encoded without template."""
        if not isinstance(prompt, str):
            return await self._shown(prompt)
        if len(prompt) > _LONG_TEXT:
            return tuple(await asyncio.to_thread(self._backend.encode, prompt))
        return tuple(self._backend.encode(prompt))

    async def score(
        self, sequences: Sequence[Sequence[int]], temperature: float, *, min_policy_version: int | None = None
    ) -> Scored:
        """Raises DomainError as PolicyService.Score does."""
        _check_temperature("temperature", temperature)
        self._check_version(min_policy_version)
        for index, sequence in enumerate(sequences):
            self._check_tokens(f"sequences[{index}]", sequence, self._backend.info.context_length)
        return await self._backend.score(sequences, temperature)

    async def update_weights(self, weights: PublishedWeights) -> None:
        """Raises DomainError as PolicyAdminService.UpdateWeights does. Cancelling the caller does not stop it."""
        await asyncio.shield(self._update(weights))

    async def close(self) -> None:
        await self._backend.close()

    async def _update(self, weights: PublishedWeights) -> None:
        async with self._updating:
            info = self._backend.info
            if weights.policy_version == info.policy_version and weights.sha256 == self._backend.serving_sha256:
                return
            if weights.policy_version <= info.policy_version:
                raise DomainError(
                    Reason.VERSION_CONFLICT,
                    f"version {info.policy_version} serves: {weights.policy_version} is not greater, or other weights",
                    policy_version=info.policy_version,
                )
            if weights.fingerprint != info.fingerprint:
                raise DomainError(
                    Reason.MODEL_MISMATCH,
                    f"the weights are of a model {weights.fingerprint}; this one, {info.model}, is {info.fingerprint}",
                )
            path = self._allowed_path(weights.uri)
            file = WeightsFile(path, weights.kind, weights.policy_version, weights.sha256)
            self._refuse_outside(file.safetensors, *(path.glob("*.json") if path.is_dir() else ()))
            await asyncio.to_thread(_verify, file)
            await self._backend.update_weights(file)

    async def _shown(self, prompt: Prompt) -> tuple[int, ...]:
        """The token ids that this service adds to a prompt."""
        if isinstance(prompt, list):
            return ()
        chat = self._backend.chat
        messages = prompt.messages if isinstance(prompt, Continuation) else prompt
        long = sum(len(message.content) for message in messages) > _LONG_TEXT
        if isinstance(prompt, Continuation):
            return await asyncio.to_thread(chat.extend, prompt) if long else chat.extend(prompt)
        return await asyncio.to_thread(chat.render, prompt) if long else chat.render(prompt)

    def _check_version(self, min_policy_version: int | None) -> None:
        version = self._backend.info.policy_version
        if min_policy_version is not None and version < min_policy_version:
            raise DomainError(
                Reason.POLICY_VERSION_TOO_OLD,
                f"version {version} serves; at least {min_policy_version} was asked for",
                policy_version=version,
            )

    def _check_tokens(self, field: str, token_ids: Sequence[int], longest: int) -> None:
        if len(token_ids) == 0:
            raise DomainError(Reason.EMPTY_PROMPT, f"{field}: at least one token is needed", field=field)
        if len(token_ids) > longest:
            raise DomainError(
                Reason.PROMPT_TOO_LONG,
                f"{field}: {len(token_ids)} tokens; the context leaves room for {longest}",
                field=field,
                token_count=len(token_ids),
                context_length=self._backend.info.context_length,
            )
        ids = np.fromiter(token_ids, dtype=np.int64, count=len(token_ids))
        size = self._backend.info.vocabulary_size
        if int(ids.min()) < 0 or int(ids.max()) >= size:
            index = int(np.flatnonzero((ids < 0) | (ids >= size))[0])
            raise DomainError(
                Reason.TOKEN_OUT_OF_VOCABULARY,
                f"{field}: token {ids[index]} at {index} is not in the vocabulary of {size}",
                field=field,
                index=index,
            )

    def _allowed_path(self, uri: str) -> Path:
        if self._weights_folder is None:
            raise DomainError(Reason.BAD_WEIGHTS_URI, "uri: this server loads no weights: it has no weights_folder")
        try:
            parts = urlsplit(uri)
            path = Path(unquote(parts.path)).resolve()
        except (ValueError, OSError, RuntimeError) as error:
            raise DomainError(Reason.BAD_WEIGHTS_URI, f"uri: {error}") from error
        if parts.scheme != "file" or parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise DomainError(Reason.BAD_WEIGHTS_URI, "uri: expected file:///…")
        self._refuse_outside(path)
        return path

    def _refuse_outside(self, *paths: Path) -> None:
        assert self._weights_folder is not None
        root = self._weights_folder.resolve()
        for path in map(Path.resolve, paths):
            if path == root or not path.is_relative_to(root):
                raise DomainError(Reason.BAD_WEIGHTS_URI, "uri: not below the server's weights folder")


def _verify(weights: WeightsFile) -> None:
    file = weights.safetensors
    try:
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise DomainError(Reason.WEIGHTS_NOT_FOUND, f"uri: there is no file {file.name}") from error
    except OSError as error:
        raise DomainError(Reason.WEIGHTS_NOT_FOUND, f"uri: {file.name} cannot be read: {error.strerror}") from error
    if found != weights.sha256:
        raise DomainError(Reason.CHECKSUM_MISMATCH, f"{file.name} has sha256 {found}, not {weights.sha256}")


def _check_temperature(field: str, value: float) -> None:
    if not value >= _LOWEST_TEMPERATURE:
        raise invalid_field(field, f"at least {_LOWEST_TEMPERATURE}")
