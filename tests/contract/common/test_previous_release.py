"""Clients of the release against today's servers, and today's clients against servers of the release."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from uuid import uuid4

import grpc
import pytest
import pytest_asyncio
from google.protobuf import unknown_fields

from mulligan.common.channel import Endpoint
from mulligan.common.errors import CallFailed, DomainError, Reason
from mulligan.common.inference import Message, Role, SamplingParams
from mulligan.common.reflections import Provenance, ReflectionQuery, RetrievalStrategy, Trial
from mulligan.common.types import Split
from mulligan.env.client import EnvClient
from mulligan.memory.client import MemoryClient
from mulligan.policy.client import PolicyClient
from mulligan.policy.v1 import policy_service_pb2 as policy_pb
from mulligan.testing.loop import Loop, small_run
from mulligan.testing.processes import ServiceProcesses
from mulligan.trainer.client import LearnerAdminClient, RunClient
from mulligan.trainer.data import Datum
from mulligan.trainer.folder import RunState
from mulligan.trainer.learner.client import LearnerClient
from mulligan.trainer.learner.settings import LearnerSpec
from mulligan.trainer.objectives.coefficients import Coefficients
from mulligan.trainer.settings import EvaluationSettings
from mulligan.trainer.wire import settings_to_proto
from tests.support.released import ReleasedServer, ReleasedStub, as_released, released, start_released

pytestmark = pytest.mark.asyncio(loop_scope="module")
SERVICES = ("env", "policy", "memory", "trainer")
ORIGIN = {"run_id": "r", "environment": "frozenlake-3x3", "task_id": "t", "reward_after": 1.0, "success": True}
QUESTION = "Where is the goal?"
RUN = small_run(steps=1, evaluation={"every": 0, "tasks": 2, "samples": 1})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def released_servers() -> AsyncIterator[dict[str, ReleasedServer]]:
    """A server of the release for each service, in front of nothing yet."""
    servers = {name: await start_released() for name in SERVICES}
    yield servers
    for server in servers.values():
        await server.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def loop(
    released_servers: dict[str, ReleasedServer],
    shared_services: ServiceProcesses,
    tmp_path_factory: pytest.TempPathFactory,
) -> Loop:
    """Today's services, whose trainer knows the others as servers of the release, and its own learners, too."""
    addresses = {f"{name}_address": server.address for name, server in released_servers.items()}
    addresses["learner_address"] = addresses.pop("trainer_address")
    folder = tmp_path_factory.mktemp("loop")
    loop = await asyncio.to_thread(partial(Loop.start, shared_services, folder, trainer=addresses))
    for name, server in released_servers.items():
        server.target = getattr(loop, name).address
    return loop


@pytest_asyncio.fixture(loop_scope="module")
async def old(loop: Loop) -> AsyncIterator[dict[str, ReleasedStub]]:
    """Clients of the release, for today's servers."""
    channels = {name: grpc.aio.insecure_channel(getattr(loop, name).address) for name in SERVICES}
    yield {
        "env": ReleasedStub(channels["env"], "env.v1.EnvService"),
        "policy": ReleasedStub(channels["policy"], "policy.v1.PolicyService"),
        "memory": ReleasedStub(channels["memory"], "memory.v1.MemoryService"),
        "run": ReleasedStub(channels["trainer"], "trainer.v1.RunService"),
        "learner": ReleasedStub(channels["trainer"], "trainer.v1.LearnerService"),
    }
    for channel in channels.values():
        await channel.close()


async def test_an_old_client_plays(old: dict[str, ReleasedStub]) -> None:
    env = old["env"]
    listed = await env.ListEnvironments()
    assert "frozenlake-3x3" in {one.name for one in listed.environments}
    page = await env.ListTasks(environment="frozenlake-3x3", split="SPLIT_TEST", page_size=2)
    episode = {"episode_id": uuid4().hex}
    started = await env.StartEpisode(**episode, environment="frozenlake-3x3", task_id=page.tasks[0].task_id)
    assert started.observation
    first = await env.StepEpisode(**episode, step_index=0, action="```Up```")
    again = await env.StepEpisode(**episode, step_index=0, action="```Up```")
    assert first.observation and first == again
    many = await env.StepEpisodes(steps=[{**episode, "step_index": 0, "action": "```Up```"}])
    assert many.items[0].step == first
    await env.EndEpisode(**episode)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await env.StartEpisode(episode_id=uuid4().hex, environment="frozenlake-3x4", task_id="t")
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND and "frozenlake-3x3" in str(refused.value.details())


async def test_an_old_client_samples(old: dict[str, ReleasedStub]) -> None:
    policy = old["policy"]
    assert (await policy.GetPolicy()).policy.fingerprint
    messages = {"messages": [{"role": "ROLE_USER", "content": QUESTION}]}
    asked = {"messages": messages, "sampling": {"temperature": 1.0, "max_tokens": 4, "seed": "7"}}
    (completion,) = (await policy.Generate(**asked)).completions
    assert 0 < len(completion.token_ids) <= 4 and len(completion.log_probs) == len(completion.token_ids)
    parts = [part async for part in policy.StreamGenerate(request=asked)]
    assert [token for part in parts for token in part.token_ids] == list(completion.token_ids)
    tokens = await policy.Tokenize(text=QUESTION)
    scored = await policy.Score(sequences=[{"ids": list(tokens.token_ids)}])
    assert len(scored.scores[0].log_probs) == len(tokens.token_ids) - 1


async def test_an_old_client_remembers(old: dict[str, ReleasedStub]) -> None:
    memory = old["memory"]
    scope = uuid4().hex
    request = {"request_id": uuid4().hex, "scope": scope, "text": "A is the player", "provenance": ORIGIN}
    added = await memory.AddReflection(**request)
    assert await memory.AddReflection(**request) == added
    query = {"scope": scope, "environment": "frozenlake-3x3", "limit": 1}
    found = await memory.QueryReflections(**query, strategy="RETRIEVAL_STRATEGY_LATEST_SUCCESS")
    assert [one.text for one in found.reflections] == ["A is the player"]
    assert (await memory.GetReflection(reflection_id=added.reflection_id)).reflection.provenance.success
    assert len((await memory.ListReflections(scope=scope)).reflections) == 1
    before = (await memory.GetSnapshot(scope=scope)).version
    deleted = await memory.DeleteReflection(reflection_id=added.reflection_id)
    assert deleted.version == before + 1


async def test_an_old_client_trains(old: dict[str, ReleasedStub]) -> None:
    runs = old["run"]
    config = as_released(settings_to_proto(RUN))
    assert config.environment == "frozenlake-3x3" and config.algorithm.second_attempt
    run_id = uuid4().hex
    request = released("trainer.v1.StartRunRequest", run_id=run_id)
    request.config.CopyFrom(config)
    await runs.StartRun(request)
    events = [entry.event async for entry in runs.WatchRun(run_id=run_id)]
    assert {"step_completed"} <= {event.WhichOneof("event") for event in events}
    done = (await runs.GetRun(run_id=run_id)).run
    assert done.state == done.DESCRIPTOR.fields_by_name["state"].enum_type.values_by_name["RUN_STATE_COMPLETED"].number
    shown = (await runs.ListExperiences(run_id=run_id)).experiences
    assert len(shown) == 8 and shown[0].first_attempt.turns
    measured = await runs.Evaluate(environment="frozenlake-3x3", run_id=run_id, config={"tasks": 2, "samples": 1})
    assert measured.result.attempts == 2


async def test_an_old_client_has_a_learner(old: dict[str, ReleasedStub]) -> None:
    learner = old["learner"]
    mine = {"learner_id": f"old-{uuid4().hex}", "owner": "old"}
    made = await learner.CreateLearner(**mine, model={"source": "embedded"}, optimizer={"learning_rate": 1e-3})
    datum = {
        "datum_id": "a",
        "token_ids": [1, 2, 3, 4],
        "loss_mask": [False, False, True, True],
        "weight": 1.0,
        "temperature": 1.0,
        "policy_gradient": {"advantage": 1.0, "rollout_log_probs": [-1.0, -1.0]},
    }
    await learner.ForwardBackward(**mine, sequence=made.next_sequence, data=[datum])
    stepped = await learner.OptimStep(**mine, sequence=made.next_sequence + 1)
    assert stepped.metrics["skipped"] == 0
    assert (await learner.GetLearner(learner_id=mine["learner_id"])).optimizer_steps == 1
    await learner.DeleteLearner(**mine)


async def test_what_is_newer_passes_through_an_old_client(old: dict[str, ReleasedStub]) -> None:
    """Its messages keep fields that they do not know, and a server ignores those that it does not know."""
    answer = await old["policy"].GetPolicy()
    assert policy_pb.GetPolicyResponse.FromString(answer.SerializeToString()).policy.dtype
    assert not hasattr(answer.policy, "dtype") and len(unknown_fields.UnknownFieldSet(answer.policy))
    later = released("env.v1.ListEnvironmentsRequest")
    later.MergeFromString(b"\xf8\xff\x07\x05")  # field 16383, a number
    assert (await old["env"].ListEnvironments(later)).environments
    with pytest.raises(AttributeError, match="had no call GenerateMany"):
        old["policy"].GenerateMany  # noqa: B018 - asks for it


async def test_todays_trainer_trains_with_servers_of_the_release(
    loop: Loop, released_servers: dict[str, ReleasedServer]
) -> None:
    run_id = uuid4().hex
    await loop.train(run_id, RUN)
    assert await loop.notices(run_id) == []
    experiences = loop.experiences(run_id)
    assert len(experiences) == 8
    assert all(sample.outcome.has_reward for chain in experiences for sample in chain.samples if sample.turns)


async def test_todays_clients_play_and_sample_at_servers_of_the_release(
    loop: Loop, released_servers: dict[str, ReleasedServer]
) -> None:
    env = EnvClient(Endpoint(released_servers["env"].address))
    (task,) = await env.list_tasks("frozenlake-3x3", Split.TEST, 1)
    assert task.tags == {}
    episode = await env.start("frozenlake-3x3", task.task_id, uuid4().hex)
    assert (await episode.step("```Up```")).observation
    await episode.end()
    many = await asyncio.gather(*(env.start("frozenlake-3x3", task.task_id, uuid4().hex) for _ in range(3)))
    assert {one.observation for one in many} == {episode.observation}, "it has no StartEpisodes"
    await asyncio.gather(*(one.end() for one in many))
    await env.close()
    policy = PolicyClient(Endpoint(released_servers["policy"].address))
    info = await policy.info()
    assert info.fingerprint and not info.sparse_uploads
    prompt = (Message(Role.USER, QUESTION),)
    sampling = SamplingParams(temperature=1.0, max_tokens=4, seed=7)
    samples = await asyncio.gather(*(policy.generate(prompt, sampling) for _ in range(3)))
    assert len({sample.token_ids for sample in samples}) == 1
    parts = [part async for part in policy.stream(prompt, sampling)]
    assert tuple(token for part in parts for token in part.token_ids) == samples[0].token_ids
    assert len((await policy.score([samples[0].token_ids])).log_probs[0]) == len(samples[0].token_ids) - 1
    await policy.close()


async def test_todays_client_remembers_at_a_server_of_the_release(
    loop: Loop, released_servers: dict[str, ReleasedServer]
) -> None:
    memory = MemoryClient(Endpoint(released_servers["memory"].address))
    scope = uuid4().hex
    origin = Provenance("r", "e", "frozenlake-3x3", "t", 0, 0.0, 1.0, True)
    entry = await memory.add(uuid4().hex, scope, "A is the player", origin)
    query = ReflectionQuery(scope, "frozenlake-3x3", RetrievalStrategy.LATEST_SUCCESS)
    assert [one.text for one in (await memory.query(query)).reflections] == ["A is the player"]
    assert (await memory.get(entry)).text == (await memory.list(scope))[0].text == "A is the player"
    with pytest.raises(CallFailed, match="uses for 0 keys, not one for each of the 1 that were asked for"):
        await memory.query(query, Trial(("use",), holdout=0.5))
    for newer in (memory.erase(entry), memory.explain(entry), memory.changes(scope)):
        with pytest.raises(CallFailed, match="UNIMPLEMENTED"):
            await newer
    assert await memory.delete(entry) == 2
    await memory.close()


async def test_an_objective_that_the_release_lacks_is_refused_by_its_learner(
    loop: Loop, released_servers: dict[str, ReleasedServer]
) -> None:
    endpoint = Endpoint(released_servers["trainer"].address)
    learner = await LearnerClient.create(endpoint, f"new-{uuid4().hex}", "new", LearnerSpec())
    datum = Datum("a", (1, 2, 3), (False, True, True), 1.0, 1.0, Coefficients((1.0, 1.0)), "")
    with pytest.raises(DomainError) as refused:
        await learner.forward_backward([datum], RUN.loss)
    assert refused.value.reason is Reason.INVALID_FIELD and "objective" in refused.value.message
    assert (await learner.optim_step())["skipped"] == 1  # nothing was counted
    await learner.close()


async def test_todays_clients_of_a_trainer_of_the_release(
    loop: Loop, released_servers: dict[str, ReleasedServer]
) -> None:
    address = released_servers["trainer"].address
    runs = RunClient(Endpoint(address))
    run_id = uuid4().hex
    await runs.start(run_id, RUN)
    assert [entry.event async for entry in runs.watch(run_id)]
    assert (await runs.get(run_id)).state is RunState.COMPLETED
    assert run_id in [one.run_id for one in await runs.runs()]
    assert len(await runs.experiences(run_id)) == 8
    told: list[tuple[int, int]] = []
    result, _ = await runs.evaluate(
        "frozenlake-3x3",
        EvaluationSettings(tasks=2, samples=1),
        run_id=run_id,
        on_progress=lambda ended, total, *_: told.append((ended, total)),
    )
    assert result.attempts == 2 and told == []
    protocols = EvaluationSettings.model_validate({"tasks": 2, "samples": 1, "protocols": [{"name": "pass_at_k"}]})
    with pytest.raises(CallFailed, match="UNIMPLEMENTED: the server does not have this call: it is of an earlier"):
        await runs.evaluate("frozenlake-3x3", protocols, run_id=run_id)
    await runs.close()
    learners = LearnerAdminClient(Endpoint(address))
    with pytest.raises(CallFailed, match="UNIMPLEMENTED"):
        await learners.list()
    await learners.close()
