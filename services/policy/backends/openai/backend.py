"""Any endpoint that speaks OpenAI's chat completions: vLLM, TGI, SGLang, a hosted model. For evaluation, for reflection
by a stronger model, for a frozen opponent.

Messages go in and text comes out. There are no token ids: completions cannot be trained on or continued, and there is
no Score and no weight update. The protocol leaves open:

- whether an endpoint honours seeds, tools and schemas. `openai.without` names those that it ignores; the policy then
  refuses them.
- top-k. The protocol has no field for it, and many endpoints use the model's default. `openai.extra_body` can set it.
- which stop string ended a completion; see `chat.ending`.

Tool calls stand in the text as `chat.render_tool_calls` writes them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, NoReturn
from urllib.parse import urlsplit

import openai
import structlog

from mulligan.common.errors import DomainError, Reason, invalid_field
from mulligan.common.foreign import is_redirect, kept, redirected
from mulligan.common.inference import Feature, ReplicaInfo, VersionSpan, WeightsKind
from mulligan.common.model_files import UnsupportedModel
from mulligan.common.proxies import is_direct
from mulligan.common.tasks import cancel
from mulligan.common.text import bounded
from mulligan.common.tracing import headers
from mulligan.policy.backend import Admission, Ask, ModelInfo, Sampled, Scored, WeightsFile
from mulligan.policy.backends.openai import Settings
from mulligan.policy.backends.openai.chat import (
    REQUEST_FIELDS,
    NotAnAnswer,
    StreamedAnswer,
    chat_request,
    ending,
    needs_tools,
    only_choice,
    text_of,
)
from mulligan.policy.model_settings import ModelSettings

log = structlog.get_logger()
_FEATURES = frozenset({Feature.STREAM, Feature.SEED, Feature.TOOLS, Feature.JSON_SCHEMA})
_PROBE_SECONDS = 2.0  # between two looks at an endpoint that is down
_PROBE_TIMEOUT = 10.0
_RETRY_AFTER = timedelta(seconds=1)
_NAMES = 500  # characters of the names of models that an endpoint serves


async def open_backend(settings: ModelSettings, first_version: int) -> OpenAIBackend:
    """Raises UnsupportedModel when the endpoint says that it has no such model or refuses the credential.

    If the endpoint is down, the policy starts anyway, and is unavailable until the endpoint answers.
    """
    endpoint = ChatEndpoint(settings)
    try:
        problem = await endpoint.check()
    except openai.APIError as error:
        endpoint.fail(endpoint.no_answer(error))
    else:
        if problem:
            await endpoint.close()
            raise UnsupportedModel(problem)
    return OpenAIBackend(settings, endpoint, first_version)


def _http_client(settings: Settings, host: str) -> openai.DefaultAsyncHttpxClient:
    https = settings.https()

    async def asks(_: object) -> None:
        if https is not None:
            https.refresh()

    return openai.DefaultAsyncHttpxClient(
        trust_env=not is_direct(host),
        verify=https.context if https else True,
        event_hooks={"request": [asks]},
        follow_redirects=False,  # prompts go to the address of the settings alone
    )


class ChatEndpoint:
    """The connection to the endpoint, which is the policy's only replica. Knows whether it answers, and counts the
    requests in flight."""

    def __init__(self, settings: ModelSettings):
        chosen = settings.own_as(Settings)
        self.address = _address(chosen.base_url)
        given = chosen.key
        self._key = given.get_secret_value() if given else ""
        key = self._key or "none"
        host = urlsplit(chosen.base_url).hostname or ""
        # The header is given explicitly: a key from the environment must not go to an endpoint of the settings.
        self.client = openai.AsyncOpenAI(
            base_url=chosen.base_url,
            api_key=key,
            default_headers={"Authorization": f"Bearer {key}"},
            timeout=openai.Timeout(chosen.request_seconds, connect=10.0),
            max_retries=chosen.max_retries,
            http_client=_http_client(chosen, host),
        )
        self._prober = self.client.with_options(max_retries=0, timeout=_PROBE_TIMEOUT)
        for client in (self.client, self._prober):
            client.organization = client.project = None  # nor others of the environment's
        self.context_length = 0  # as the endpoint tells it
        self._model = settings.model
        self._seconds = chosen.request_seconds
        self._places = asyncio.Semaphore(chosen.concurrency)
        self._max_queue = settings.max_queue
        self._waiting = self._in_flight = 0
        self._problem = ""
        self._probing: asyncio.Task[None] | None = None

    @property
    def info(self) -> ReplicaInfo:
        return ReplicaInfo(self.address, not self._problem, self._in_flight, self._problem)

    async def score(self, sequences: Sequence[Sequence[int]], temperature: float) -> Scored:
        raise _unsupported("sequences", Feature.SCORE)

    async def checksum(self) -> str:
        return ""  # it tells none

    async def check(self) -> str:
        """Why the endpoint cannot serve the model; empty if it can, or if it lists no models. Raises openai.APIError if
        it does not answer."""
        try:
            listed = await self._prober.models.list()
        except openai.APIStatusError as error:
            if error.status_code in (401, 403):
                return _refuses_credential(self.address, error.status_code)
            if is_redirect(error.status_code):
                return self._redirected(error)
            if error.status_code >= 500 or error.status_code == 429:
                raise
            return ""  # it lists no models
        models = {model.id: model for model in getattr(listed, "data", None) or ()}
        if models and self._model not in models:
            names = bounded(", ".join(sorted(models)[:20]), _NAMES)
            return f"{self.address} does not serve the model {self._model}, but {names}"
        if models:
            length = (models[self._model].model_extra or {}).get("max_model_len")  # vLLM and SGLang tell it
            self.context_length = length if isinstance(length, int) else 0
        return ""

    def fail(self, problem: str) -> None:
        """Refuses requests until a probe finds that the endpoint answers again."""
        if not self._problem:
            log.warning("endpoint is down", endpoint=self.address, problem=problem)
        self._problem = problem
        if self._probing is None or self._probing.done():
            self._probing = asyncio.create_task(self._probe())

    async def _probe(self) -> None:
        while self._problem:
            await asyncio.sleep(_PROBE_SECONDS)
            try:
                self._problem = await self.check()
            except openai.APIError as error:
                self._problem = self.no_answer(error)
        log.info("endpoint answers", endpoint=self.address)

    @asynccontextmanager
    async def place(self) -> AsyncIterator[float]:
        """Waits until fewer than `openai.concurrency` requests are in flight. Yields the deadline, as a time of the
        event loop. Turns failures of the endpoint into DomainErrors."""
        if self._problem:
            raise _unavailable(self._problem, timedelta(seconds=_PROBE_SECONDS))
        if self._places.locked() and self._waiting >= self._max_queue:
            raise DomainError(Reason.QUEUE_FULL, f"{self._waiting} requests wait", retry_after=_RETRY_AFTER)
        self._waiting += 1
        try:
            await self._places.acquire()
        finally:
            self._waiting -= 1
        self._in_flight += 1
        try:
            yield asyncio.get_running_loop().time() + self._seconds
        except openai.APIConnectionError as error:
            self.fail(self.no_answer(error))
            raise _unavailable(self._problem, timedelta(seconds=_PROBE_SECONDS)) from error
        except openai.APIError as error:
            raise self._refusal(error) from error
        except NotAnAnswer as error:
            raise _unavailable(f"{self.address} answers {error}", _RETRY_AFTER) from error
        except TimeoutError as error:
            raise _unavailable(f"{self.address} took more than {self._seconds:g} s", _RETRY_AFTER) from error
        finally:
            self._in_flight -= 1
            self._places.release()

    def _refusal(self, error: openai.APIError) -> DomainError:
        status = _status(error)
        if status in (401, 403):
            return _unavailable(_refuses_credential(self.address, status), _RETRY_AFTER)
        if is_redirect(status) and isinstance(error, openai.APIStatusError):
            return _unavailable(self._redirected(error), _RETRY_AFTER)
        told = f"HTTP {status or 200}, {self._kept(_said(error))}"
        if status == 404:
            return _unavailable(f"{self.address}: {told}", _RETRY_AFTER)
        if status not in (400, 413, 422):
            return _unavailable(f"{self.address}: {told}", _wait(error))
        if _beyond_context(error):
            return DomainError(
                Reason.PROMPT_TOO_LONG,
                f"prompt: beyond the context of the model at {self.address}: {told}",
                field="prompt",
                context_length=self.context_length,
            )
        parameter = error.param if error.param in REQUEST_FIELDS else "request"
        return invalid_field(parameter, f"what {self.address} takes, which refuses it: {told}")

    def _redirected(self, error: openai.APIStatusError) -> str:
        return redirected(self.address, error.status_code, error.response.headers.get("location", ""))

    def _kept(self, said: str) -> str:
        return kept(self.address, said, self._key)

    def no_answer(self, error: openai.APIError) -> str:
        """What callers are told. What the system says of a connection is ours; anything else may be the endpoint's."""
        if isinstance(error, openai.APITimeoutError):
            return f"{self.address} does not answer in time"
        ours = _system_error(error)
        return f"{self.address} does not answer: {ours or self._kept(str(error.__cause__ or _said(error)))}"

    async def close(self) -> None:
        await cancel(self._probing)
        await self.client.close()


class OpenAIBackend:
    def __init__(self, settings: ModelSettings, endpoint: ChatEndpoint, first_version: int):
        self._settings = settings
        self._own = settings.own_as(Settings)
        self._endpoint = endpoint
        self._version = first_version
        self._limit = "max_tokens"

    @property
    def model(self) -> ModelInfo:
        told = self._own.context_length or self._settings.context_length
        return ModelInfo(
            model=self._settings.model,
            fingerprint="",
            context_length=told or self._endpoint.context_length,
            vocabulary_size=0,
            end_of_turn_token_ids=(),
            rewrites_history=True,  # nobody can tell: callers send all messages each turn
            deterministic=False,
            dtype="",
            features=_FEATURES.difference(map(Feature, self._own.without)),
            adapters=tuple(self._settings.adapters),
            capacity=self._own.concurrency + self._settings.max_queue,
        )

    @property
    def policy_version(self) -> int:
        return self._version

    @property
    def replicas(self) -> Sequence[ChatEndpoint]:
        return (self._endpoint,)

    @property
    def chat(self) -> None:
        return None

    @property
    def compute_seconds(self) -> float:
        return 0.0

    def encode(self, text: str) -> list[int]:
        raise _unsupported("text", Feature.TOKEN_IDS)

    def decode(self, token_ids: Sequence[int]) -> str:
        raise _unsupported("token_ids", Feature.TOKEN_IDS)

    def decode_marked(self, token_ids: Sequence[int], text: str) -> str:
        return text

    async def generate(self, ask: Ask) -> Sampled:
        request = self._request(ask)
        async with self._endpoint.place() as due, asyncio.timeout_at(due):
            choice, usage = only_choice(await self._create(request))
            text = text_of(choice.message)
            reason, missing = ending(choice, text, ask.sampling, usage.completion_tokens if usage else None)
        return Sampled((), (), reason, (VersionSpan(self._version, 0),), text + missing)

    async def stream(self, ask: Ask) -> AsyncIterator[Sampled]:
        request = self._request(ask) | {"stream": True, "stream_options": {"include_usage": True}}
        answer = StreamedAnswer(ask.sampling)
        async with self._endpoint.place() as due:
            # Not one timeout around it all: between two parts the time is the caller's.
            async with asyncio.timeout_at(due):
                chunks = await self._create(request)
            if not isinstance(chunks, openai.AsyncStream):
                raise NotAnAnswer("no stream")
            async with chunks:
                while True:
                    async with asyncio.timeout_at(due):
                        chunk = await anext(chunks, None)
                    if chunk is None:
                        break
                    if text := answer.take(chunk):
                        yield Sampled((), (), None, (), text)
            reason, missing = answer.finish()
        yield Sampled((), (), reason, (VersionSpan(self._version, 0),), missing)

    def _request(self, ask: Ask) -> dict[str, Any]:
        if Feature.TOOLS not in self.model.features and (field := needs_tools(ask)):
            raise _unsupported(field, Feature.TOOLS)
        model = self._settings.adapters[ask.adapter] if ask.adapter else self._settings.model
        return chat_request(model, ask)

    async def _create(self, request: dict[str, Any]) -> object:
        """Sends the request. If the endpoint refuses the limit on tokens, sends it again with the newer name or
        without."""
        if self._limit not in request:
            request[self._limit] = request.pop("max_tokens")
        while True:
            try:
                return await self._endpoint.client.chat.completions.create(
                    **request, extra_body=self._own.extra_body or None, extra_headers=headers() or None
                )
            except openai.BadRequestError as error:
                if "max_tokens" in request and "max_completion_tokens" in _said(error):
                    self._limit = "max_completion_tokens"  # of newer models, which no longer take the older name
                    request[self._limit] = request.pop("max_tokens")
                elif self._limit in request and _beyond_context(error):
                    # The prompt may fit, but not with max_tokens behind it: without a limit, the context is one.
                    del request[self._limit]
                else:
                    raise

    async def score(self, sequences: Sequence[Sequence[int]], temperature: float, adapter: str = "") -> Scored:
        return await self._endpoint.score(sequences, temperature)

    async def update_weights(self, weights: WeightsFile, admit: Admission) -> None:
        """Gives the endpoint's weights another version number. Raises DomainError UNSUPPORTED_OPTION for new
        weights."""
        if weights.kind is not WeightsKind.ORIGINAL:
            raise _unsupported("kind", Feature.FULL_WEIGHTS)
        await admit(self._endpoint, weights)
        self._version = weights.policy_version

    async def release_memory(self) -> NoReturn:
        raise _unsupported("policy", Feature.MEMORY_RELEASE)

    async def resume_memory(self) -> NoReturn:
        raise _unsupported("policy", Feature.MEMORY_RELEASE)

    async def close(self) -> None:
        await self._endpoint.close()


def _address(base_url: str) -> str:
    """The URL without user, password and query, which may be secret. Raises UnsupportedModel."""
    try:
        parts = urlsplit(base_url)
        host = parts.hostname or ""
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        raise UnsupportedModel("openai.base_url: expected an address such as http://127.0.0.1:8000/v1") from None
    if parts.scheme not in ("http", "https") or not host:
        raise UnsupportedModel("openai.base_url: expected an address such as http://127.0.0.1:8000/v1")
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{port}{parts.path}"


def _unsupported(field: str, feature: Feature) -> DomainError:
    return DomainError(
        Reason.UNSUPPORTED_OPTION,
        f"{field}: an OpenAI-compatible endpoint lacks {feature.value}",
        field=field,
        feature=feature.value,
    )


def _unavailable(problem: str, retry_after: timedelta) -> DomainError:
    return DomainError(Reason.ENGINE_UNAVAILABLE, problem, retry_after=retry_after)


def _refuses_credential(address: str, status: int) -> str:
    return f"{address} refuses the credential (HTTP {status}): see openai.api_key"


def _status(error: openai.APIError) -> int:
    """HTTP status of the answer, or the code in the error event of a stream; 0 if there is none."""
    status = getattr(error, "status_code", None)
    code = status if status is not None else (error.body.get("code") if isinstance(error.body, dict) else None)
    return int(code) if isinstance(code, int) or (isinstance(code, str) and code.isdecimal()) else 0


def _said(error: openai.APIError) -> str:
    body = error.body
    message = body.get("message") or body.get("detail") if isinstance(body, dict) else None
    return str(message or error.message)


def _system_error(error: BaseException | None) -> str:
    """What the operating system says, in the chain of causes; empty if it says nothing."""
    while error is not None:
        if isinstance(error, OSError):
            return str(error) or type(error).__name__
        error = error.__cause__ or error.__context__
    return ""


def _beyond_context(error: openai.APIError) -> bool:
    said = _said(error).lower()
    return error.code == "context_length_exceeded" or "context length" in said or "context_length" in said


def _wait(error: openai.APIError) -> timedelta:
    """The Retry-After of the answer, in seconds, within limits."""
    header = error.response.headers.get("retry-after", "") if isinstance(error, openai.APIStatusError) else ""
    return timedelta(seconds=min(int(header), 300)) if header.isdecimal() else _RETRY_AFTER
