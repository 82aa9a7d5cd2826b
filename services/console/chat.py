"""A chat with a policy that serves, under the system prompt of an environment. Answers cost an engine's time, so they
need the console's key (`guard`)."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import parse_qs

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mulligan.cli.out import json_safe
from mulligan.common.inference import CallOptions, Completion, Message, Role, SamplingParams
from mulligan.console.services import ServiceAnswer, ServicesPort

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
        sampling = SamplingParams(temperature=talk.temperature, max_tokens=talk.max_tokens)
        answer = await self._services.complete(asked.messages, sampling, CallOptions(policy=talk.policy))
        prompts = await self._services.prompts()
        if answer.found is None:
            return await self._shown(request, talk, prompts, error=answer.error, text=text)
        done = answer.found
        return await self._shown(request, asked.then(Said(Role.ASSISTANT, done.text, _note(done))), prompts)

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


def _note(done: Completion) -> str:
    versions = ", ".join(dict.fromkeys(str(span.policy_version) for span in done.policy_versions))
    return f"{len(done.token_ids)} tokens · {done.stop_reason} · version {versions or 'unknown'}"


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
