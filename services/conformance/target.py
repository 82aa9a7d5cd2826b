"""The server under check: calls with a deadline, refusals as values, and calls that undo what a check did."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from mulligan.common.channel import Endpoint, check_protection, open_channel
from mulligan.common.proxies import grpc_options
from mulligan.common.status import DOMAIN
from mulligan.common.tls import ClientTls
from mulligan.common.tokens import bearer
from mulligan.conformance.report import Violation, shown

CONNECT_SECONDS = 10.0
_MESSAGE_BYTES = 64 * 2**20


class TargetUnreachable(Exception):
    """The target cannot be checked: it does not answer, serves something else, or wants a credential."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The error of a call: status code, and reason and metadata of its ErrorInfo if it has one of our domain. `flaw`
    says what is wrong with the error's details."""

    code: str
    message: str
    reason: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    retry_seconds: float | None = None
    flaw: str = ""

    def __str__(self) -> str:
        metadata = f" {dict(self.metadata)}" if self.metadata else ""
        reason = f" {self.reason}{metadata}" if self.reason else f" {self.flaw or 'without ErrorInfo'}"
        return f"{self.code}{reason}: {self.message}"


def refusal(error: grpc.aio.AioRpcError) -> Refusal:
    code = error.code().name
    message = error.details() or ""
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]  # the stub knows synchronous calls alone
    except ValueError as problem:
        return Refusal(code, message, flaw=f"with details that contradict the status ({problem})")
    found: dict[str, Any] = {}
    for detail in status.details if status is not None else ():
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo.FromString(detail.value)
            if info.domain == DOMAIN:
                found |= {"reason": info.reason, "metadata": dict(info.metadata)}
            else:
                found["flaw"] = f"with an ErrorInfo of domain {info.domain!r}, not {DOMAIN!r}"
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo.FromString(detail.value)
            found["retry_seconds"] = retry.retry_delay.ToTimedelta().total_seconds()
    return Refusal(code, message, **found)


class Target:
    """A connection to a server. `stubs` are the stub classes of the services that it serves. Raises BadTls, and
    UnprotectedToken if others could read a token, unless `insecure` is set."""

    def __init__(
        self,
        address: str,
        *stubs: Any,
        token: str | None = None,
        reader_token: str | None = None,
        timeout: float = 30.0,
        tls: ClientTls | None = None,
        insecure: bool = False,
    ) -> None:
        for each in (token, reader_token):
            check_protection(Endpoint(address, token=each, tls=tls, insecure=insecure))
        self.address = address
        self.token = token
        self.timeout = timeout
        self.reader_token = reader_token
        options = [
            ("grpc.max_send_message_length", _MESSAGE_BYTES),
            ("grpc.max_receive_message_length", _MESSAGE_BYTES),
            ("grpc.use_local_subchannel_pool", 1),
            *grpc_options(address),
        ]
        self.channel = open_channel(address, tls, options)
        self._methods = {name: method for stub in stubs for name, method in vars(stub(self.channel)).items()}

    async def connect(self, method: str, request: Any) -> Any:
        """The answer to a first, harmless call. Raises TargetUnreachable if it fails."""
        try:
            timeout = min(self.timeout, CONNECT_SECONDS)
            return await self._methods[method](request, timeout=timeout, metadata=self.metadata)
        except grpc.aio.AioRpcError as error:
            code = error.code()
            hint = {
                grpc.StatusCode.DEADLINE_EXCEEDED: "it did not answer in time: is something serving there?",
                grpc.StatusCode.UNIMPLEMENTED: "it serves another service",
                grpc.StatusCode.UNAUTHENTICATED: "it wants a token",
                grpc.StatusCode.PERMISSION_DENIED: "it wants a token with another role",
            }.get(code, "")
            details = "; ".join(filter(None, (hint, error.details())))
            raise TargetUnreachable(f"{self.address}: {method} failed with {code.name}: {details}") from None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return bearer(self.token) if self.token else ()

    def method(self, name: str) -> Any:
        return self._methods[name]

    async def close(self) -> None:
        await self.channel.close()


class CheckSession:
    """The calls of one check at a target.

    `ask` expects an answer, `refused` and `bad_field` expect a refusal, `attempt` takes either. `later` registers a
    call for `clean_up`, which runs after the check.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self._later: list[tuple[str, Any]] = []

    async def ask(self, method: str, request: Any) -> Any:
        """The answer. Raises Violation for a refusal."""
        answer = await self.attempt(method, request)
        if isinstance(answer, Refusal):
            raise Violation("this call is answered", answer, request)
        return answer

    async def attempt(self, method: str, request: Any, *, metadata: Any = None, timeout: float = 0.0) -> Any:
        """The answer, or the Refusal."""
        if metadata is None:
            metadata = self.target.metadata
        try:
            answer = await self.target.method(method)(
                request, timeout=timeout or self.target.timeout, metadata=metadata
            )
        except grpc.aio.AioRpcError as error:
            return self._refusal(error, request, timeout)
        if answer is None:  # grpc.aio could not read the message
            raise Violation(f"a message of {method}", "bytes that are none", request)
        return answer

    async def stream(self, method: str, request: Any, *, enough: int = 0, timeout: float = 0.0) -> list[Any] | Refusal:
        """All messages of a streamed answer, or the first `enough`; the Refusal when it ended with one. `timeout` is
        for all of it."""
        seconds = timeout or self.target.timeout
        call = self.target.method(method)(request, timeout=seconds, metadata=self.target.metadata)
        messages: list[Any] = []
        try:
            async for message in call:
                messages.append(message)
                if len(messages) == enough:
                    break
        except grpc.aio.AioRpcError as error:
            return self._refusal(error, request, timeout)
        finally:
            call.cancel()
        return messages

    def _refusal(self, error: grpc.aio.AioRpcError, request: Any, timeout: float = 0.0) -> Refusal:
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and not timeout:
            raise Violation(f"an answer within {self.target.timeout:g} s (--timeout)", "none", request) from None
        found = refusal(error)
        if found.code == "UNAVAILABLE" and not found.reason:
            raise Violation("the server goes on serving", found, request) from None
        return found

    async def refused(self, method: str, request: Any, code: str, reason: str, *metadata: str) -> Refusal:
        """The refusal that the contract demands: code, reason, and keys of its metadata. Raises Violation otherwise."""
        answer = await self.attempt(method, request)
        return as_demanded(answer, request, code, reason, *metadata)

    async def bad_field(self, method: str, request: Any, field_name: str) -> None:
        """Expects that the request is refused for this field. Raises Violation otherwise."""
        found = await self.refused(method, request, "INVALID_ARGUMENT", "INVALID_FIELD", "field", "expected")
        named = found.metadata["field"]
        if named != field_name and not named.startswith((f"{field_name}.", f"{field_name}[")):
            raise Violation(f"INVALID_ARGUMENT INVALID_FIELD whose metadata `field` is {field_name!r}", found, request)

    def later(self, method: str, request: Any) -> None:
        """Registers a call to make after the check, whether it passes or not."""
        self._later.append((method, request))

    async def clean_up(self) -> None:
        while self._later:
            method, request = self._later.pop()
            try:
                await self.target.method(method)(request, timeout=5.0, metadata=self.target.metadata)
            except grpc.aio.AioRpcError:  # the checks report it; here nothing more can be done
                continue


def as_demanded(answer: Any, request: Any, code: str, reason: str, *metadata: str) -> Refusal:
    """The answer, if it is the refusal that the contract demands. Raises Violation otherwise."""
    keys = f" with metadata {', '.join(f'`{key}`' for key in metadata)}" if metadata else ""
    demanded = f"{code} {reason}{keys}"
    if not isinstance(answer, Refusal):
        fields = shown(request).partition(" ")[2]
        raise Violation(demanded, f"an answer: {shown(answer)}", request, words=f"with {fields} it should have refused")
    if (answer.code, answer.reason) != (code, reason) or any(not answer.metadata.get(key) for key in metadata):
        raise Violation(demanded, answer, request)
    return answer


async def all_pages(ask: Callable[[str], Awaitable[Any]]) -> AsyncIterator[Any]:
    """Yields the pages of a listing. `ask` gets the page token, "" at first. Raises Violation if a token comes twice:
    that list has no end."""
    seen: set[str] = set()
    token = ""
    while True:
        page = await ask(token)
        yield page
        token = page.next_page_token
        if not token:
            return
        if token in seen:
            raise Violation("each page has a token of its own: the list comes to an end", f"{token!r} again")
        seen.add(token)


async def gathered(awaitables: Any) -> list[Any]:
    """All results. After an exception it waits for the rest and then raises it, so that no call outlives the check."""
    results = await asyncio.gather(*awaitables, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
