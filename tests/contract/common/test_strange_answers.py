"""Whatever a server of another make answers, our clients give a value or raise one of their three errors, and never
wait for ever. MULLIGAN_TEST_BYTES sets how many answers each call gets (100 by default)."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool

from mulligan.common.channel import Endpoint
from mulligan.common.errors import CallFailed, DomainError, ServiceUnavailable
from mulligan.common.inference import PublishedWeights, SamplingParams, WeightsKind
from mulligan.common.reflections import Provenance, ReflectionQuery, RetrievalStrategy, Trial, UseOutcome
from mulligan.common.types import EpisodeStep, Split
from mulligan.env.client import EnvClient
from mulligan.env.v1 import env_service_pb2 as env_pb
from mulligan.memory.client import MemoryClient
from mulligan.policy.client import PolicyClient
from mulligan.trainer.client import RunClient
from mulligan.trainer.learner.client import LearnerClient
from mulligan.trainer.learner.settings import LearnerSpec
from mulligan.trainer.losses import ppo
from mulligan.trainer.settings import EvaluationSettings, RunSettings
from tests.support.learning import sampled
from tests.support.mutations import Mutations

ANSWERS = int(os.environ.get("MULLIGAN_TEST_BYTES", "100"))
TYPED = (DomainError, CallFailed, ServiceUnavailable)
SECONDS = 100.0  # nothing here takes a thousandth of it
ORIGIN = Provenance("run", "experience", "frozenlake-3x3", "train/00000", 1, 0.0, 1.0, True)
WEIGHTS = PublishedWeights(1, WeightsKind.FULL, "file:///weights", "0" * 64, "fingerprint")
# A list whose tokens are always new has no end.
PLAUSIBLE: dict[str, tuple[Any, ...]] = {"next_page_token": ("",), "environment": ("frozenlake-3x3",), "seconds": (1,)}


class Strange(grpc.GenericRpcHandler):
    """Answers every call with a message of its type that is odd or damaged; some with an odd error."""

    def __init__(self) -> None:
        self.mutations = Mutations("answers", PLAUSIBLE)
        self.random = random.Random(1)
        self.given = b""  # instead, where it is set

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        method = descriptor_pool.Default().FindMethodByName(details.method.lstrip("/").replace("/", "."))

        async def answer(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
            if self.random.random() < 0.1 and not self.given:
                junk = self.random.randbytes(self.random.choice((1, 30, 300)))
                context.set_trailing_metadata((("grpc-status-details-bin", junk),))
                await context.abort(self.random.choice((grpc.StatusCode.INTERNAL, grpc.StatusCode.NOT_FOUND)), "odd")
            return self.given or self.mutations.serialized(method.output_type)

        async def answers(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
            for _ in range(3):
                yield await answer(request, context)

        kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(answers if method.server_streaming else answer)


@pytest.fixture
async def strange() -> AsyncIterator[tuple[Strange, Endpoint]]:
    handler = Strange()
    server = grpc.aio.server(handlers=[handler])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield handler, Endpoint(f"127.0.0.1:{port}", outage_seconds=0.0)
    await server.stop(None)


async def env_calls(client: EnvClient) -> AsyncIterator[Callable[[], Awaitable[Any]]]:
    yield client.list_environments
    yield lambda: client.describe("text")
    yield lambda: client.list_tasks("text", Split.TRAIN, 2)
    yield lambda: client.start("text", "task", "episode")
    yield lambda: client.fork("episode", 1, "other")
    yield lambda: client.step("episode", 0, "a")
    yield lambda: asyncio.gather(*(client.step(f"episode-{number}", 0, "a") for number in range(5)))
    yield lambda: client.end("episode")


async def memory_calls(client: MemoryClient) -> AsyncIterator[Callable[[], Awaitable[Any]]]:
    yield lambda: client.snapshot("scope")
    yield lambda: client.query(ReflectionQuery("scope", "text", RetrievalStrategy.TOP_GAIN))
    yield lambda: client.add("request", "scope", "text", ORIGIN)
    yield lambda: client.get("reflection")
    yield lambda: client.list("scope", 2)
    yield lambda: client.delete("reflection")
    yield lambda: client.query(ReflectionQuery("scope", "text", RetrievalStrategy.EXPLORE), Trial(("one", "two"), 0.5))
    yield lambda: client.report([UseOutcome("use", 1.0)])
    yield lambda: client.revise("reflection", "request", 1, text="text")
    yield lambda: client.erase("reflection")
    yield lambda: client.explain("reflection")
    yield lambda: client.changes("scope", 2)


async def policy_calls(client: PolicyClient) -> AsyncIterator[Callable[[], Awaitable[Any]]]:
    async def stream() -> None:
        async for _ in client.stream([5], SamplingParams()):
            pass

    yield client.info
    yield lambda: client.generate([5], SamplingParams())
    yield lambda: client.sample([5], SamplingParams(), 2)
    yield stream
    yield lambda: client.score([[5, 6]])
    yield lambda: client.tokenize("text")
    yield lambda: client.load_model("actor", "embedded")
    yield lambda: client.update_weights(WEIGHTS)
    yield lambda: client.rollback(1)
    yield client.policies
    yield client.versions


async def run_calls(client: RunClient) -> AsyncIterator[Callable[[], Awaitable[Any]]]:
    async def watch() -> None:
        async for _ in client.watch("run"):
            pass

    yield lambda: client.start("run", RunSettings(environment="text"))
    yield lambda: client.get("run")
    yield watch
    yield lambda: client.stop("run")
    yield lambda: client.evaluate("text", EvaluationSettings())
    yield lambda: client.experiences("run", limit=1)
    yield client.runs


async def learner_calls(client: LearnerClient) -> AsyncIterator[Callable[[], Awaitable[Any]]]:
    yield lambda: client.forward([sampled()])
    yield lambda: client.forward_backward([sampled()], ppo.Settings())
    yield client.optim_step
    yield lambda: client.save_checkpoint("one")
    yield lambda: client.load_checkpoint("one")
    yield lambda: client.publish_weights(1)
    yield client.compute_seconds
    yield client.delete
    yield lambda: LearnerClient.create(client._connection.endpoint, "learner", "owner", LearnerSpec())


CLIENTS: dict[str, tuple[Callable[[Endpoint], Any], Callable[[Any], AsyncIterator[Callable[[], Awaitable[Any]]]]]] = {
    "env": (EnvClient, env_calls),
    "memory": (MemoryClient, memory_calls),
    "policy": (PolicyClient, policy_calls),
    "run": (RunClient, run_calls),
    "learner": (lambda endpoint: LearnerClient(endpoint, "learner", "owner"), learner_calls),
}


@pytest.mark.parametrize("name", CLIENTS)
async def test_a_value_or_a_typed_error(strange: tuple[Strange, Endpoint], name: str) -> None:
    make, calls = CLIENTS[name]
    client = make(strange[1])
    errors = 0
    try:
        async for call in calls(client):
            for _ in range(ANSWERS):
                try:
                    async with asyncio.timeout(SECONDS):
                        await call()
                except TYPED:
                    errors += 1
    finally:
        await client.close()
    assert errors


LISTINGS: dict[str, Callable[[Any], Awaitable[Any]]] = {
    "env": lambda client: client.list_tasks("text", Split.TRAIN, 2),
    "memory": lambda client: client.list(),
    "memory changes": lambda client: client.changes(),
    "policy": lambda client: client.policies(),
    "policy versions": lambda client: client.versions(),
    "run": lambda client: client.runs(),
    "run experiences": lambda client: client.experiences("run"),
}


@pytest.mark.parametrize("name", LISTINGS)
async def test_a_page_token_that_comes_again_ends_the_list(strange: tuple[Strange, Endpoint], name: str) -> None:
    handler, endpoint = strange
    answer = env_pb.ListTasksResponse(next_page_token="again")  # the token is field 2 of every listing
    handler.given = answer.SerializeToString()
    client = CLIENTS[name.partition(" ")[0]][0](endpoint)
    async with asyncio.timeout(SECONDS):
        with pytest.raises(CallFailed, match="the answer violates the contract: next_page_token 'again' comes again"):
            await LISTINGS[name](client)
    await client.close()


async def test_a_batch_with_too_few_answers_fails_at_once(strange: tuple[Strange, Endpoint]) -> None:
    handler, endpoint = strange
    answer = env_pb.StepEpisodesResponse()
    answer.items.add().step.observation = "o"
    handler.given = answer.SerializeToString()
    client = EnvClient(endpoint)
    steps = [client.step(f"episode-{number}", 0, "a") for number in range(3)]
    async with asyncio.timeout(SECONDS):
        found = await asyncio.gather(*steps, return_exceptions=True)
    await client.close()
    # A step that is tried again alone gets the same bytes, which mean something else there.
    assert all(isinstance(each, CallFailed | EpisodeStep) for each in found), found
