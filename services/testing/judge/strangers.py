"""Callers without the right credential, who try everything while the services have other troubles."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message

from mulligan.common.access import AccessRole
from mulligan.common.tokens import bearer
from mulligan.env.v1 import env_service_pb2
from mulligan.memory.v1 import memory_service_pb2
from mulligan.policy.v1 import policy_admin_service_pb2, policy_service_pb2
from mulligan.testing.judge.access import NO_TOKEN, UNKNOWN_TOKEN, least_role, may
from mulligan.testing.judge.intruders import Intruders
from mulligan.testing.judge.network import channel_to
from mulligan.testing.judge.recorder import CallRecorder
from mulligan.trainer.v1 import learner_service_pb2, run_service_pb2

SERVICES: dict[str, ServiceDescriptor] = {
    found.full_name: found
    for contract in (
        env_service_pb2,
        memory_service_pb2,
        policy_service_pb2,
        policy_admin_service_pb2,
        learner_service_pb2,
        run_service_pb2,
    )
    for found in contract.DESCRIPTOR.services_by_name.values()
}
_SECONDS = 5.0  # of a call


class Strangers:
    """`addresses` are those of the services, each with the full names of what it serves. `tokens` are of roles.
    Every second call is one of the `intruders`. `pause` is the time between two calls, in seconds. With
    `ca`, authorities to trust, they speak TLS."""

    def __init__(
        self,
        addresses: Mapping[str, Sequence[str]],
        tokens: Mapping[AccessRole, str],
        recorder: CallRecorder,
        chance: random.Random,
        intruders: Intruders,
        pause: float = 0.2,
        ca: bytes = b"",
    ):
        self._address = {service: address for address, services in addresses.items() for service in services}
        self._intruders = intruders
        self._calls = [
            (address, f"/{service}/{call}")
            for address, services in addresses.items()
            for service in services
            for call in SERVICES[service].methods_by_name
        ]
        self._tokens = tokens
        self._recorder = recorder
        self._chance = chance
        self._pause = pause
        self._ca = ca
        self._credentials: dict[str, list[str]] = {}  # by call: those that are still to be tried, the last one first
        self.made = 0
        self.tried_each_call = asyncio.Event()  # set once each was made by some stranger

    async def try_on(self) -> None:
        """Until it is cancelled: each call once, then each again with another credential."""
        waiting: list[tuple[str, str]] = []
        channels = {address: channel_to(address, self._ca) for address, _ in self._calls}
        try:
            while True:
                if not waiting:
                    if self.made:
                        self.tried_each_call.set()
                    waiting = self._chance.sample(self._calls, len(self._calls))
                address, method = waiting.pop()
                await self._try(channels[address], method)
                await asyncio.sleep(self._pause)
                method, request = await self._intruders.request(lambda service: channels[self._address[service]])
                channel = channels[self._address[method.split("/")[1]]]
                await self._call(channel, method, request, *self._intruders.credential())
                await asyncio.sleep(self._pause)
        finally:
            for channel in channels.values():
                await channel.close()

    async def _try(self, channel: grpc.aio.Channel, method: str) -> None:
        left = self._credentials.setdefault(method, [])
        if not left:
            wrong = [NO_TOKEN, UNKNOWN_TOKEN, *(role for role in self._tokens if not may(role, method))]
            right = [AccessRole.READER] if least_role(method) == AccessRole.READER else []  # it changes nothing
            left += [*right, *self._chance.sample(wrong, len(wrong))]
        credential = left.pop()
        token = "no-token-of-anybody" if credential == UNKNOWN_TOKEN else self._tokens.get(credential)  # type: ignore[call-overload]
        await self._call(channel, method, _kinds(method)[0](), credential, bearer(token) if token else None)

    async def _call(
        self, channel: grpc.aio.Channel, method: str, request: Message, credential: str, metadata: Any
    ) -> None:
        number = self._recorder.begin(method, request, credential)
        self.made += 1
        call: Any = channel.stream_stream(method, lambda one: one.SerializeToString(), _kinds(method)[1].FromString)
        try:
            answers = call(iter([request]), timeout=_SECONDS, metadata=metadata)
            self._recorder.end(number, [one async for one in answers])
        except grpc.aio.AioRpcError as error:
            self._recorder.end(number, None, error)


def _kinds(method: str) -> tuple[Any, Any]:
    _, service, call = method.split("/")
    found = SERVICES[service].methods_by_name[call]
    return message_factory.GetMessageClass(found.input_type), message_factory.GetMessageClass(found.output_type)
