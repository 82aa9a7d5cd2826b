"""Numbers that a server in another language should not answer: each client raises a typed error that names the field,
or the step has failed. None reaches a journal."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import grpc
import pytest
from google.protobuf import descriptor_pool
from google.protobuf.message import Message

from mulligan.common.channel import Endpoint
from mulligan.common.errors import CallFailed
from mulligan.common.inference import SamplingParams
from mulligan.common.reflections import ReflectionQuery, RetrievalStrategy, UseOutcome
from mulligan.common.types import Outcome, Split
from mulligan.env.client import EnvClient
from mulligan.env.v1 import env_service_pb2 as env_pb
from mulligan.memory.client import MemoryClient
from mulligan.memory.v1 import memory_service_pb2 as memory_pb
from mulligan.policy.client import PolicyClient
from mulligan.policy.v1 import policy_service_pb2 as policy_pb
from mulligan.testing.processes import ServiceProcesses
from mulligan.trainer.harness import Harness
from mulligan.trainer.learner.client import LearnerClient
from mulligan.trainer.v1 import learner_service_pb2 as learner_pb
from tests.support.fakes import FakePolicy
from tests.support.faulty_env import Faulty, served
from tests.support.learning import sampled
from tests.support.playing import play_episode

NAN = math.nan
INF = math.inf


class Odd(Faulty):
    """The dice, with other rewards than they have: None is no reward."""

    odd: float | None = NAN

    def said(self, step: env_pb.StepEpisodeResponse) -> env_pb.StepEpisodeResponse:
        if self.odd is None:
            step.ClearField("reward")
        else:
            step.reward = self.odd
        return step


def with_reward(odd: float | None) -> type[Odd]:
    return type("Odd", (Odd,), {"odd": odd})


@pytest.mark.parametrize(
    ("reward", "said"),
    [(NAN, "reward nan"), (INF, "reward inf"), (-INF, "reward -inf"), (1e200, "reward 1e+200"), (None, "no reward")],
)
async def test_an_attempt_with_an_odd_reward_is_excluded_and_the_reward_named(reward: float | None, said: str) -> None:
    async with served(with_reward(reward)) as address:
        client = EnvClient(Endpoint(address))
        policy = FakePolicy(lambda system, last, sampling: "3")
        info = await client.describe("dice")
        harness = Harness(client, policy, info, await policy.info(), uuid4().hex, max_restarts=1)
        attempt = await play_episode(harness, "attempt", "train/1", "solve", SamplingParams(max_tokens=100))
        alone = await (await client.start("dice", "train/1", "alone")).step("3")
        await client.close()
    assert (attempt.outcome, attempt.reward, attempt.restarts) == (Outcome.ENV_ERROR, None, 1)
    assert said in attempt.error and all(turn.reward == 0 for turn in attempt.turns)
    assert alone.outcome is Outcome.ENV_ERROR and alone.reward is None and said in alone.error


@pytest.mark.parametrize("how", [{}, {"feedback": "unary"}, {"untrusted": True}], ids=str)
async def test_an_environment_with_odd_rewards(shared_services: ServiceProcesses, how: dict[str, object]) -> None:
    faults = {"none": "reward None", "huge": "reward 1e+200", "numpy": ""}
    table = {"kind": "tests.support.dice", **how}
    environments = {name: {**table, "fault": f"reward-{name}"} for name in faults}
    client = EnvClient(Endpoint(shared_services.start("env", environments=environments).address))
    for name, said in faults.items():
        step = await (await client.start(name, "train/1", str(uuid4()))).step("3")
        assert said in step.error and step.reward == (None if said else 0.5)
        assert (step.outcome is Outcome.ENV_ERROR) is bool(said)
    await client.close()


async def test_the_largest_rewards_are_rewards() -> None:
    for reward in (1e12, -1e12, 0.0):
        async with served(with_reward(reward)) as address:
            client = EnvClient(Endpoint(address))
            step = await (await client.start("dice", "train/1", "one")).step("3")
            await client.close()
        assert step.reward == reward and step.outcome is not Outcome.ENV_ERROR


class Answering(grpc.GenericRpcHandler):
    """Answers each method with the message that is set for it."""

    def __init__(self) -> None:
        self.answers: dict[str, Message] = {}

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        method = descriptor_pool.Default().FindMethodByName(details.method.lstrip("/").replace("/", "."))
        given = self.answers[method.name]

        async def answer(_: Any, context: Any) -> bytes:
            return given.SerializeToString()

        async def answers(_: Any, context: Any) -> AsyncIterator[bytes]:
            yield given.SerializeToString()

        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(answers)
        return grpc.unary_unary_rpc_method_handler(answer)


@asynccontextmanager
async def answering(answer: Message, method: str) -> AsyncIterator[Endpoint]:
    handler = Answering()
    handler.answers[method] = answer
    server = grpc.aio.server(handlers=[handler])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield Endpoint(f"127.0.0.1:{port}", outage_seconds=0.0)
    await server.stop(None)


def completion(**fields: Any) -> policy_pb.GenerateResponse:
    message = policy_pb.Completion(text="a", stop_reason=policy_pb.STOP_REASON_END_OF_TURN, **fields)
    return policy_pb.GenerateResponse(completions=[message])


def scores(*values: float) -> policy_pb.ScoreResponse:
    return policy_pb.ScoreResponse(scores=[policy_pb.ScoreResponse.Scores(log_probs=values)])


def reflection(**origin: Any) -> memory_pb.QueryReflectionsResponse:
    return stored(provenance=memory_pb.Provenance(**origin))


def stored(**fields: Any) -> memory_pb.QueryReflectionsResponse:
    return memory_pb.QueryReflectionsResponse(reflections=[memory_pb.StoredReflection(reflection_id="r", **fields)])


def forwarded(value: float) -> learner_pb.ForwardResponse:
    response = learner_pb.ForwardResponse()
    response.log_probs.add().log_probs.extend([value] * sum(sampled().loss_mask))
    return response


async def stream(client: PolicyClient) -> None:
    async for _ in client.stream([5], SamplingParams()):
        pass


Ask = Callable[[Any], Any]
POLICY: dict[str, tuple[Ask, list[tuple[Message, str]]]] = {
    "Generate": (
        lambda client: client.generate([5], SamplingParams()),
        [
            (completion(token_ids=[1], log_probs=[NAN]), "log_probs nan"),
            (completion(token_ids=[1, 2], log_probs=[-1.0, -INF]), "log_probs -inf"),
            (completion(token_ids=[1], log_probs=[0.5]), "log_probs 0.5"),
            (completion(token_ids=[1, 2], log_probs=[-1.0]), "1 log_probs of 2 tokens"),
            (completion(token_ids=[-7], log_probs=[-1.0]), "token_ids -7"),
            (completion(policy_versions=[{"policy_version": 1, "token_count": -1}]), "token_count -1"),
        ],
    ),
    "StreamGenerate": (
        stream,
        [(policy_pb.StreamGenerateResponse(token_ids=[1], log_probs=[NAN]), "log_probs nan")],
    ),
    "Score": (
        lambda client: client.score([[5, 6]]),
        [
            (scores(NAN), "log_probs nan"),
            (scores(1.0), "log_probs 1.0"),
            (scores(-1.0, -1.0), "2 log_probs of 1 tokens"),
            (policy_pb.ScoreResponse(), "0 scores of 1 sequences"),
        ],
    ),
    "Tokenize": (lambda client: client.tokenize("a"), [(policy_pb.TokenizeResponse(token_ids=[-1]), "token_ids -1")]),
    "GetPolicy": (
        lambda client: client.info(),
        [
            (policy_pb.GetPolicyResponse(policy=policy_pb.Policy(context_length=-1)), "context_length -1"),
            (policy_pb.GetPolicyResponse(policy=policy_pb.Policy(compute_seconds=NAN)), "compute_seconds nan"),
        ],
    ),
}
MEMORY: dict[str, tuple[Ask, list[tuple[Message, str]]]] = {
    "QueryReflections": (
        lambda client: client.query(ReflectionQuery("scope", "e", RetrievalStrategy.TOP_GAIN)),
        [
            (reflection(reward_before=NAN), "reward_before nan"),
            (reflection(reward_after=INF), "reward_after inf"),
            (stored(uplift=memory_pb.Uplift(lower=NAN)), "uplift nan"),
            (stored(uplift=memory_pb.Uplift(mean_reward_shown=INF)), "uplift.mean_reward inf"),
            (stored(uplift=memory_pb.Uplift(uses_shown=-1)), "uplift.uses -1"),
            (stored(revision=-1), "revision -1"),
            (stored(kind=9), "ReflectionKind 9"),
            (stored(status=9), "ReflectionStatus 9"),
            (memory_pb.QueryReflectionsResponse(version=-1), "version -1"),
            (memory_pb.QueryReflectionsResponse(uses=[memory_pb.Use(use_id="u")]), "uses for 1 keys"),
        ],
    ),
    "ReportOutcome": (
        lambda client: client.report([UseOutcome("use", 1.0)]),
        [(memory_pb.ReportOutcomeResponse(counted=-1), "counted -1")],
    ),
    "ExplainReflection": (
        lambda client: client.explain("reflection"),
        [
            (memory_pb.ExplainReflectionResponse(uses=[memory_pb.RecordedUse(holdout=NAN)]), "uses.holdout nan"),
            (memory_pb.ExplainReflectionResponse(uses=[memory_pb.RecordedUse(reward=INF)]), "uses.reward inf"),
        ],
    ),
    "ListChanges": (
        lambda client: client.changes("scope"),
        [(memory_pb.ListChangesResponse(changes=[memory_pb.Change(version=-1)]), "changes.version -1")],
    ),
    "ReviseReflection": (
        lambda client: client.revise("reflection", "request", 1, key="k"),
        [(memory_pb.ReviseReflectionResponse(revision=-1), "revision -1")],
    ),
    "EraseReflection": (
        lambda client: client.erase("reflection"),
        [(memory_pb.EraseReflectionResponse(version=-1), "version -1")],
    ),
    "GetSnapshot": (
        lambda client: client.snapshot("scope"),
        [(memory_pb.GetSnapshotResponse(version=-1), "version -1")],
    ),
}
LEARNER: dict[str, tuple[Ask, list[tuple[Message, str]]]] = {
    "Forward": (
        lambda client: client.forward([sampled()]),
        [(forwarded(NAN), "log_probs nan"), (forwarded(2.0), "log_probs 2.0")],
    ),
    "GetLearner": (
        lambda client: client.compute_seconds(),
        [(learner_pb.GetLearnerResponse(compute_seconds=-1.0), "compute_seconds -1.0")],
    ),
}
ENV: dict[str, tuple[Ask, list[tuple[Message, str]]]] = {
    "ListTasks": (
        lambda client: client.list_tasks("e", Split.TRAIN, 1),
        [
            (
                env_pb.ListTasksResponse(
                    tasks=[env_pb.TaskInfo(task_id="t", split=env_pb.SPLIT_TRAIN, difficulty=NAN)]
                ),
                "difficulty nan",
            )
        ],
    ),
}
CASES = [
    (make, method, ask, answer, said)
    for make, calls in (
        (PolicyClient, POLICY),
        (MemoryClient, MEMORY),
        (lambda endpoint: LearnerClient(endpoint, "learner", "owner"), LEARNER),
        (EnvClient, ENV),
    )
    for method, (ask, answers) in calls.items()
    for answer, said in answers
]


@pytest.mark.parametrize(
    ("make", "method", "ask", "answer", "said"), CASES, ids=[f"{case[1]}-{case[4]}" for case in CASES]
)
async def test_an_odd_number_is_an_error_that_names_the_field(
    make: Any, method: str, ask: Ask, answer: Message, said: str
) -> None:
    async with answering(answer, method) as endpoint:
        client = make(endpoint)
        with pytest.raises(CallFailed, match="violates the contract") as caught:
            await ask(client)
        await client._connection.close()
    assert said in str(caught.value) and caught.value.code == "INTERNAL"


async def test_an_attempt_with_odd_log_probabilities_is_the_policys_error() -> None:
    async with served() as address, answering(completion(token_ids=[1], log_probs=[NAN]), "Generate") as endpoint:
        client = EnvClient(Endpoint(address))
        policy = PolicyClient(endpoint)
        info = await client.describe("dice")
        harness = Harness(client, policy, info, await FakePolicy(lambda *_: "").info(), uuid4().hex, max_restarts=0)
        attempt = await play_episode(harness, "attempt", "train/1", "solve", SamplingParams(max_tokens=100))
        await client.close()
        await policy.close()
    assert attempt.outcome is Outcome.POLICY_ERROR and "log_probs nan" in attempt.error and not attempt.sequences


async def test_a_gradient_norm_need_not_be_finite() -> None:
    async with answering(learner_pb.OptimStepResponse(metrics={"grad_norm": INF}), "OptimStep") as endpoint:
        client = LearnerClient(endpoint, "learner", "owner")
        assert await client.optim_step() == {"grad_norm": INF}
        await client._connection.close()


async def test_an_environment_with_odd_numbers_is_listed_as_unavailable() -> None:
    class OddInfo(Faulty):
        def told(self, info: env_pb.EnvironmentInfo) -> None:
            info.max_reward = NAN

    async with served(OddInfo) as address:
        client = EnvClient(Endpoint(address))
        info = await client.describe("dice")
        await client.close()
    assert "max_reward nan" in info.unavailable and math.isfinite(info.max_reward)
