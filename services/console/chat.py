"""A chat with a policy that serves, under the system prompt of an environment. Answers cost an engine's time, so they
need the console's key (`guard`)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from urllib.parse import parse_qs

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from mulligan.cli.out import json_safe
from mulligan.common.inference import CallOptions, Message, Role, SamplingParams, StopReason
from mulligan.common.text import safe
from mulligan.console.services import ERRORS, ServiceAnswer, ServicesPort

MOST_BYTES = 4 * 2**20  # of a conversation


class Said(msgspec.Struct, frozen=True):
    """A message of a conversation. `note` is what is known of an answer."""

    role: Role
    text: str
    note: str = ""


class Talk(msgspec.Struct, frozen=True):
    """What the page holds, and sends again with each message."""

    policy: str = ""
    environment: str = ""
    system: str = ""
    temperature: float = 1.0
    max_tokens: int = 256
    history: tuple[Said, ...] = ()

    def then(self, *said: Said) -> Talk:
        return msgspec.structs.replace(self, history=(*self.history, *said))

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(temperature=self.temperature, max_tokens=self.max_tokens)

    @property
    def messages(self) -> tuple[Message, ...]:
        begin = [Message(Role.SYSTEM, self.system)] if self.system else []
        return (*begin, *(Message(one.role, one.text) for one in self.history))


class ChatPages:
    """`page` renders a template with values."""

    def __init__(self, services: ServicesPort, page: Callable[..., Response]) -> None:
        self._services = services
        self._page = page

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/chat", self.begin, methods=["GET"], name="chat"),
            Route("/chat", self.say, methods=["POST"]),
            Route("/chat/stream", self.stream, methods=["POST"]),
        ]

    async def begin(self, request: Request) -> Response:
        """A new conversation. An environment in the query brings its prompt."""
        given = request.query_params
        talk = Talk(policy=given.get("policy", ""), environment=given.get("environment", ""))
        prompts = await self._services.prompts()
        talk = msgspec.structs.replace(talk, system=(prompts.found or {}).get(talk.environment, ""))
        return await self._shown(request, talk, prompts, error=prompts.error if talk.environment else "")

    async def say(self, request: Request) -> Response:
        talk, text = _read(await _body(request))
        asked = talk.then(Said(Role.USER, text))
        answer = await self._services.complete(asked.messages, talk.sampling, CallOptions(policy=talk.policy))
        prompts = await self._services.prompts()
        if answer.found is None:
            return await self._shown(request, talk, prompts, error=answer.error, text=text)
        done = answer.found
        versions = [span.policy_version for span in done.policy_versions]
        note = _note(len(done.token_ids), done.stop_reason, versions)
        return await self._shown(request, asked.then(Said(Role.ASSISTANT, done.text, note)), prompts)

    async def stream(self, request: Request) -> Response:
        """As `say`, for the page's script: a JSON object a line. Those with `text` are parts of the answer, the last
        one has the note and the history, or an error."""
        talk, text = _read(await _body(request))
        headers = {"Cache-Control": "no-store"}
        return StreamingResponse(self._lines(talk.then(Said(Role.USER, text))), 200, headers, "application/x-ndjson")

    async def _lines(self, asked: Talk) -> AsyncIterator[bytes]:
        said, count, stop = "", 0, None
        versions: list[int] = []
        try:
            async for part in self._services.stream(asked.messages, asked.sampling, CallOptions(policy=asked.policy)):
                said += part.text
                count += len(part.token_ids)
                stop = part.stop_reason or stop
                versions += [span.policy_version for span in part.policy_versions]
                if part.text:
                    yield _line(text=safe(part.text))
        except (*ERRORS, OSError) as error:  # TimeoutError is an OSError
            yield _line(error=safe(str(error) or "the policy service did not answer in time"))
            return
        note = _note(count, stop, versions)
        history = asked.then(Said(Role.ASSISTANT, said, note)).history
        yield _line(note=safe(note), history=json_safe(msgspec.json.encode(history).decode()))

    async def _shown(
        self, request: Request, talk: Talk, prompts: ServiceAnswer[dict[str, str]], *, error: str = "", text: str = ""
    ) -> Response:
        policies = await self._services.policies()
        return self._page(
            request,
            "chat.html",
            talk=talk,
            history=json_safe(msgspec.json.encode(talk.history).decode()),
            policies=[one.info.name for one in policies.policies],
            environments=sorted(prompts.found or {}),
            error=error or ("" if policies.policies else "; ".join(policies.errors.values())),
            text=text,
        )


def _note(tokens: int, stop: StopReason | None, versions: Iterable[int]) -> str:
    told = ", ".join(dict.fromkeys(map(str, versions)))
    return f"{tokens} tokens · {stop or 'unknown'} · version {told or 'unknown'}"


def _line(**values: str) -> bytes:
    return msgspec.json.encode(values) + b"\n"


async def _body(request: Request) -> dict[str, str]:
    """The fields of a form."""
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > MOST_BYTES:
            raise HTTPException(413, f"The conversation is longer than {MOST_BYTES} bytes: begin a new one.")
    fields = parse_qs(content.decode("utf-8", "replace"), keep_blank_values=True)
    return {name: values[-1].replace("\r\n", "\n") for name, values in fields.items()}


def _read(fields: dict[str, str]) -> tuple[Talk, str]:
    """The conversation so far, and the new message."""
    try:
        history = msgspec.json.decode(fields.get("history") or "[]", type=tuple[Said, ...])
        values = {name: fields[name] for name in Talk.__struct_fields__ if name in fields and name != "history"}
        talk = msgspec.convert({**values, "history": history}, Talk, strict=False)
    except msgspec.ValidationError as error:
        raise HTTPException(400, f"The form has a wrong value: {error}") from error
    except msgspec.DecodeError as error:
        raise HTTPException(400, f"history: expected messages as JSON: {error}") from error
    if not (text := fields.get("text", "").strip("\n")):
        raise HTTPException(400, "text: expected a message")
    return talk, text
