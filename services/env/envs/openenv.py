"""Episodes of a running OpenEnv server (https://github.com/meta-pytorch/OpenEnv), over its WebSocket protocol.

    [environments.lake]
    kind = "openenv"
    url = "http://127.0.0.1:8000"
    action = "text"               # the field of the action that takes what the agent writes
    observation = ["text"]        # the fields of an observation that the agent is shown

Each episode has its own connection, which is OpenEnv's session. OpenEnv's answers do not name the request that they
belong to. So a connection whose answer is late is closed, and its episode has failed. An action that does not fit the
server's schema is invalid, and the agent is told why.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from mulligan.common.errors import DomainError, Reason
from mulligan.common.foreign import kept
from mulligan.common.http_keys import key_problem
from mulligan.common.proxies import is_direct
from mulligan.common.rewards import read_reward
from mulligan.common.tls import BadTls, ClientTls, HttpsContext, read_client_tls
from mulligan.env import numbered
from mulligan.env.base import (
    EnvironmentInfo,
    Faulted,
    MissingExtra,
    Split,
    StepResult,
    TaskInfo,
)
from mulligan.env.numbered import MAX_TASKS
from mulligan.env.prompts import generic_prompts
from mulligan.env.tool_calls import printable
from mulligan.env.workers import TimedOut

if TYPE_CHECKING:
    from websockets.sync.client import ClientConnection

_FIRST_SEED = {Split.TRAIN: 0, Split.TEST: MAX_TASKS + 1}
_SCHEMES = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}
_MESSAGE_BYTES = 64 * 2**20
_CLOSE_SECONDS = 2.0
_RETRY_AFTER = timedelta(seconds=1)
_MARK = "{action}"
_SHOWN = 200  # characters of an action in a reading
_TOLD = 500  # characters of what a server says is wrong
_TEXT = "Answer with your action."
_JSON = "Answer with your action as a JSON object."
_FEW = "expected a number of seeds, or a list of what `reset` is given"


@dataclass(frozen=True, slots=True)
class Settings:
    """`action` is the field that takes the agent's text, or a table in which `{action}` stands for that text. Without
    it the agent writes the action itself, as a JSON object. `train_tasks` and `test_tasks` are numbers of seeds for
    `reset`, or lists of tables, one table of arguments for each task. `reset` holds the arguments that all tasks have.
    `feedback_field` is a field of the last observation. `token_env` names the variable that holds the bearer token, if
    the server wants one. It goes to another machine over TLS alone (https or wss), unless `insecure` is set. `tls_ca`,
    `tls_cert` and `tls_key` are as in `ClientTls`; without `tls_ca` the system's authorities are trusted.
    """

    url: str
    action: str | dict[str, Any] = ""
    observation: tuple[str, ...] = ()  # all
    feedback_field: str = ""
    max_steps: int = 100
    max_reward: float = 1.0
    train_tasks: int | list[dict[str, Any]] = 1000
    test_tasks: int | list[dict[str, Any]] = 100
    reset: dict[str, Any] = field(default_factory=dict)
    deterministic: bool = False  # OpenEnv's servers don't say
    timeout_seconds: float = 30.0
    token_env: str = ""
    insecure: bool = False
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    task: str = "You are to solve a task by acting step by step. Each message shows what came of your last action."
    action_format: str = ""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in _SCHEMES or not parts.hostname:
            raise ValueError("url must be of the form http://host:port, or with https, ws or wss")
        if parts.username or parts.password:
            raise ValueError("url must hold no credentials: token_env names the variable that does")
        if self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, not {self.max_steps}")
        if self.timeout_seconds <= 0:
            raise ValueError(f"timeout_seconds must be above 0, not {self.timeout_seconds}")
        if isinstance(self.action, dict) and _MARK not in json.dumps(self.action):
            raise ValueError(f"action must have the text {_MARK} where the agent's goes, not only {self.action}")
        for setting, tasks in (("train_tasks", self.train_tasks), ("test_tasks", self.test_tasks)):
            if not 0 <= (tasks if isinstance(tasks, int) else len(tasks)) <= MAX_TASKS:
                raise ValueError(f"{setting}: {_FEW}, at most {MAX_TASKS} (ids have five digits)")
        if self.token_env and self.token_env not in os.environ:
            raise ValueError(f"token_env: there is no variable {self.token_env}")
        if self.token_env and (problem := key_problem(self.url, insecure=self.insecure)):
            raise ValueError(f"url: {problem}, or `insecure` beside it")
        try:
            tls = self.tls
        except (BadTls, ValueError) as error:
            raise ValueError(f"tls_…: {error}") from error
        if tls and not self.server.startswith("wss:"):
            raise ValueError("url: with tls_… set, expected an address that begins with https:// or wss://")

    @property
    def tls(self) -> ClientTls | None:
        """Raises ValueError and BadTls for bad TLS settings."""
        return read_client_tls(self.tls_ca, "", self.tls_cert, self.tls_key)

    @property
    def server(self) -> str:
        """The URL to connect to."""
        parts = urlsplit(self.url)
        path = parts.path.rstrip("/")
        path = path if path.endswith("/ws") else f"{path}/ws"
        return urlunsplit((_SCHEMES[parts.scheme], parts.netloc, path, parts.query, ""))

    @property
    def shown(self) -> str:
        """The URL for messages: without its query, which may hold a key."""
        parts = urlsplit(self.url)
        return urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))


class Session:
    """One connection. Raises Faulted, TimedOut, or DomainError CAPACITY_REACHED. It cannot be used after an error."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._connection = self._connect()

    def ask(self, kind: str, data: Mapping[str, Any]) -> dict[str, Any]:
        """Sends a request and returns the data of the answer. Raises ActionRefused for an action that does not fit the
        server's schema."""
        from websockets.exceptions import ConnectionClosed

        sent = json.dumps({"type": kind, "data": data}, ensure_ascii=False)
        try:
            with suppress(ConnectionClosed):  # what the server said before is still to be read
                self._connection.send(sent)
            raw = self._connection.recv(timeout=self._settings.timeout_seconds)
        except TimeoutError:
            self.close()  # nobody reads the answer that may still come
            limit = f"{self._settings.timeout_seconds:g} s"
            raise TimedOut(f"{self._settings.shown} did not answer {kind} within {limit}") from None
        except (ConnectionClosed, OSError) as error:
            self.close()
            told = kept(self._settings.shown, str(error))
            raise Faulted(f"{self._settings.shown} closed the connection during {kind}: {told}") from None
        return self._read(kind, raw)

    def close(self) -> None:
        """Also ends an `ask` in another thread."""
        from websockets.exceptions import ConnectionClosed

        with suppress(ConnectionClosed, OSError):
            self._connection.send('{"type": "close"}')
        self._connection.close()

    def _connect(self) -> ClientConnection:
        from websockets.exceptions import WebSocketException
        from websockets.sync.client import connect

        from mulligan.env.envs._openenv_connection import Redirected, UnredirectedConnection

        settings = self._settings
        token = os.environ.get(settings.token_env, "") if settings.token_env else ""
        try:
            tls = settings.tls
            return connect(
                settings.server,
                ssl=HttpsContext(tls).context if tls else None,
                additional_headers={"Authorization": f"Bearer {token}"} if token else None,
                open_timeout=settings.timeout_seconds,
                close_timeout=_CLOSE_SECONDS,
                ping_interval=None,  # a server that is busy with a step may not answer one
                max_size=_MESSAGE_BYTES,
                compression=None,
                proxy=None if is_direct(urlsplit(settings.url).hostname or "") else True,
                create_connection=UnredirectedConnection,
            )
        except (OSError, WebSocketException) as error:  # TimeoutError is an OSError
            # What the system says of a connection is ours; what came back by it is not.
            told = str(error) if isinstance(error, OSError | Redirected) else kept(settings.shown, str(error))
            raise Faulted(f"no OpenEnv server at {settings.shown}: {type(error).__name__}: {told}") from None

    def _read(self, kind: str, raw: str | bytes) -> dict[str, Any]:
        try:
            answer = json.loads(raw)
            type_ = answer["type"]
            data = answer["data"]
        except (ValueError, TypeError, KeyError, RecursionError):
            self.close()
            told = kept(self._settings.shown, repr(raw[:_TOLD]))
            raise Faulted(f"{self._settings.shown} answered {kind} with no OpenEnv message: {told}") from None
        if type_ == "observation" and isinstance(data, dict) and isinstance(data.get("observation"), dict):
            return data
        code = str(data.get("code", "")) if isinstance(data, dict) else ""
        if type_ == "error" and code == "VALIDATION_ERROR" and kind == "step":
            raise ActionRefused(_problems(data.get("errors")))
        self.close()
        told = kept(self._settings.shown, f"{type_}: {data!r}"[:_TOLD])
        if code == "CAPACITY_REACHED":
            raise DomainError(
                Reason.CAPACITY_REACHED, f"{self._settings.shown} is full: {told}", retry_after=_RETRY_AFTER
            )
        raise Faulted(f"{self._settings.shown} answered {kind} with an error: {told}")


class ActionRefused(Exception):
    """The action does not fit the server's schema; the message says why."""


class OpenEnvEpisode:
    def __init__(self, settings: Settings, arguments: Mapping[str, Any]) -> None:
        self._settings = settings
        self._steps = 0
        self._session = Session(settings)
        try:
            self.observation = self._show(self._session.ask("reset", arguments)["observation"])
        except BaseException:
            self._session.close()
            raise

    def step(self, action: str) -> StepResult:
        self._steps += 1
        reading = printable(action, _SHOWN) or "(nothing)"
        try:
            data = self._session.ask("step", self._action(action))
        except ActionRefused as refusal:
            return self._result(f"The action is invalid: {refusal}", f"{reading} (invalid)")
        self.observation = self._show(data["observation"])
        try:
            reward = 0.0 if data.get("reward") is None else read_reward(data["reward"])
        except ValueError as error:
            told = kept(self._settings.shown, str(error))
            raise Faulted(f"{self._settings.shown} answered step with a bad reward: {told}") from None
        feedback = data["observation"].get(self._settings.feedback_field, "") if data.get("done") else ""
        return self._result(self.observation, reading, reward, bool(data.get("done")), str(feedback))

    def close(self) -> None:
        self._session.close()

    def _result(
        self, observation: str, reading: str, reward: float = 0.0, done: bool = False, feedback: str = ""
    ) -> StepResult:
        truncated = not done and self._steps >= self._settings.max_steps
        feedback = "The step limit was reached." if truncated else feedback
        return StepResult(observation, reading, reward, done or truncated, truncated, feedback)

    def _action(self, text: str) -> dict[str, Any]:
        template = self._settings.action
        if isinstance(template, dict):
            filled: dict[str, Any] = _fill(template, text)
            return filled
        return {template: text} if template else _read_object(text)

    def _show(self, fields: Mapping[str, Any]) -> str:
        wanted = self._settings.observation or tuple(fields)
        missing = [name for name in wanted if name not in fields]
        if missing:
            told = kept(self._settings.shown, f"fields {', '.join(fields)}")
            raise Faulted(f"observation: {self._settings.shown} sends no field {missing[0]!r}: {told}")
        texts = {name: _as_text(fields[name]) for name in wanted}
        return next(iter(texts.values())) if len(texts) == 1 else "\n".join(map(": ".join, texts.items()))


class OpenEnv:
    """Connects to the server only when an episode starts."""

    def __init__(self, name: str, settings: Settings) -> None:
        self._settings = settings
        self._given = {Split.TRAIN: settings.train_tasks, Split.TEST: settings.test_tasks}
        self._counts = {split: given if isinstance(given, int) else len(given) for split, given in self._given.items()}
        self.info = EnvironmentInfo(
            name=name,
            description=f"an OpenEnv server: {settings.shown}",
            prompts=generic_prompts(settings.task, settings.action_format or (_TEXT if settings.action else _JSON)),
            max_steps=settings.max_steps,
            max_reward=settings.max_reward,
            deterministic=settings.deterministic,
            task_counts=self._counts,
        )

    def list_tasks(self, split: Split, offset: int, limit: int) -> Sequence[TaskInfo]:
        return [TaskInfo(task_id, split, 0.0) for task_id in numbered.ids(split, offset, limit, self._counts)]

    def start(self, task_id: str) -> OpenEnvEpisode:
        return OpenEnvEpisode(self._settings, {**self._settings.reset, **self._arguments(task_id)})

    def _arguments(self, task_id: str) -> Mapping[str, Any]:
        split, number = numbered.read_id(task_id, self._counts, self.info.name)
        given = self._given[split]
        return {"seed": _FIRST_SEED[split] + number} if isinstance(given, int) else given[number]


def create(name: str, settings: Settings) -> OpenEnv:
    """Raises MissingExtra, and ValueError that names the setting."""
    try:
        import websockets.sync.client  # noqa: F401 - what a session uses
    except ImportError as error:
        raise MissingExtra("openenv", error) from error
    return OpenEnv(name, settings)


def _fill(template: Any, text: str) -> Any:
    if isinstance(template, str):
        return template.replace(_MARK, text)
    if isinstance(template, dict):
        return {key: _fill(value, text) for key, value in template.items()}
    return [_fill(value, text) for value in template] if isinstance(template, list) else template


def _read_object(text: str) -> dict[str, Any]:
    """Reads from the first brace to the last, and ignores words and fences around them. Raises ActionRefused."""
    try:
        found = json.loads(text[text.index("{") : text.rindex("}") + 1])
    except (ValueError, RecursionError):
        raise ActionRefused("expected a JSON object") from None
    return dict(found)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _problems(errors: Any) -> str:
    """Pydantic's errors, in words."""
    items = errors if isinstance(errors, list) else []
    said = (
        f"{'.'.join(map(str, item.get('loc', ())))}: {item.get('msg', '')}" for item in items if isinstance(item, dict)
    )
    return printable("; ".join(said) or "it does not fit the schema", _TOLD)
