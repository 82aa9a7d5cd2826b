"""The contracts as they were released (`proto/released/v1.binpb`): clients that know nothing newer, and servers.

Messages are made from the descriptors when they are needed. A client of the release is `ReleasedStub`. A server of it
is `ReleasedServer`: today's server behind one that reads and writes the released messages alone, and has the released
calls alone. It forgets what is newer, in both directions, as a server of then would.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import cache
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message

from tests.support.paths import ROOT

SECONDS = 60.0


@cache
def _pool() -> descriptor_pool.DescriptorPool:
    files = descriptor_pb2.FileDescriptorSet()
    files.ParseFromString((ROOT / "proto" / "released" / "v1.binpb").read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.Add(file)
    return pool


def released(name: str, **fields: Any) -> Any:
    """A released message, such as `released("env.v1.TaskInfo", task_id="a")`."""
    kind = message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"mulligan.{name}"))
    return json_format.ParseDict(fields, kind())


def as_released(message: Message) -> Any:
    """What the release knows of one of today's messages."""
    kind = message_factory.GetMessageClass(_pool().FindMessageTypeByName(message.DESCRIPTOR.full_name))
    known = kind.FromString(message.SerializeToString())
    known.DiscardUnknownFields()
    return known


def _classes(method: MethodDescriptor) -> tuple[Any, Any]:
    return message_factory.GetMessageClass(method.input_type), message_factory.GetMessageClass(method.output_type)


class ReleasedStub:
    """Calls of a service, by name: `await stub.GetPolicy(request)`, and `[part async for part in stub.WatchRun(…)]`.
    What is not released is no attribute. Requests are released messages; `sent` are their fields."""

    def __init__(self, channel: grpc.aio.Channel, service: str):
        self._channel = channel
        self._service = _pool().FindServiceByName(f"mulligan.{service}")

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in self._service.methods_by_name:
            raise AttributeError(f"{self._service.full_name} had no call {name}")
        method = self._service.methods_by_name[name]
        request, response = _classes(method)
        kind = (
            "stream_unary" if method.client_streaming else "unary_stream" if method.server_streaming else "unary_unary"
        )
        made = getattr(self._channel, kind)(
            f"/{self._service.full_name}/{name}",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )

        def call(asked: Any = None, **sent: Any) -> Any:
            return made(json_format.ParseDict(sent, request()) if asked is None else asked, timeout=SECONDS)

        return call


class _ReleasedHandler(grpc.GenericRpcHandler):
    def __init__(self, target: Callable[[], grpc.aio.Channel]):
        self._target = target

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        _, service, name = str(handler_call_details.method).split("/")
        try:
            method = _pool().FindServiceByName(service).methods_by_name[name]
        except KeyError:
            return None  # UNIMPLEMENTED
        request, response = _classes(method)
        options: dict[str, Any] = {
            "request_serializer": request.SerializeToString,
            "response_deserializer": response.FromString,
        }
        codecs: dict[str, Any] = {
            "request_deserializer": _forgetting(request),
            "response_serializer": _forget,
        }
        path = f"/{service}/{name}"

        async def unary(asked: Any, context: Any) -> Any:
            return await _passed_on(self._target().unary_unary(path, **options)(asked, **_as(context)), context)

        async def collected(asked: AsyncIterator[Any], context: Any) -> Any:
            return await _passed_on(self._target().stream_unary(path, **options)(asked, **_as(context)), context)

        async def stream(asked: Any, context: Any) -> AsyncIterator[Any]:
            call = self._target().unary_stream(path, **options)(asked, **_as(context))
            try:
                async for answer in call:
                    yield answer
            except grpc.aio.AioRpcError as error:
                await _refused(error, context)
            finally:
                call.cancel()

        if method.client_streaming:
            return grpc.stream_unary_rpc_method_handler(collected, **codecs)
        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(stream, **codecs)
        return grpc.unary_unary_rpc_method_handler(unary, **codecs)


def _as(context: Any) -> dict[str, Any]:
    return {"timeout": context.time_remaining()}


def _forgetting(kind: Any) -> Callable[[bytes], Any]:
    def read(data: bytes) -> Any:
        message = kind.FromString(data)
        message.DiscardUnknownFields()
        return message

    return read


def _forget(message: Any) -> bytes:
    message.DiscardUnknownFields()
    return bytes(message.SerializeToString())


async def _passed_on(call: Any, context: Any) -> Any:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        return await _refused(error, context)


async def _refused(error: grpc.aio.AioRpcError, context: Any) -> Any:
    trailing = error.trailing_metadata() or ()
    context.set_trailing_metadata(tuple(pair for pair in trailing if pair[0] == "grpc-status-details-bin"))
    return await context.abort(error.code(), error.details() or "")


class ReleasedServer:
    """A server of the release. `target` is the address of today's server behind it; it may be set later."""

    def __init__(self, address: str, server: grpc.aio.Server):
        self.address = address
        self.target = ""
        self.server = server
        self._channels: dict[str, grpc.aio.Channel] = {}

    def channel(self) -> grpc.aio.Channel:
        if self.target not in self._channels:
            self._channels[self.target] = grpc.aio.insecure_channel(self.target)
        return self._channels[self.target]

    async def close(self) -> None:
        await self.server.stop(1.0)
        for channel in self._channels.values():
            await channel.close()


async def start_released() -> ReleasedServer:
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)])
    port = server.add_insecure_port("127.0.0.1:0")
    started = ReleasedServer(f"127.0.0.1:{port}", server)
    server.add_generic_rpc_handlers((_ReleasedHandler(started.channel),))
    await server.start()
    return started
