"""What each service answers to bad input, as a client in any language sees it: the status code and the reason on the
wire. After each refusal the service serves on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
import torch
from safetensors.torch import save_file

from mulligan.common.server import RequestInterceptor
from mulligan.common.status import from_rpc_error
from mulligan.common.v1 import message_pb2
from mulligan.env.v1 import env_service_pb2 as env_pb
from mulligan.env.v1 import env_service_pb2_grpc as env_grpc
from mulligan.models.build import build_model
from mulligan.policy.v1 import policy_admin_service_pb2 as admin_pb
from mulligan.policy.v1 import policy_admin_service_pb2_grpc as admin_grpc
from mulligan.policy.v1 import policy_service_pb2 as policy_pb
from mulligan.policy.v1 import policy_service_pb2_grpc as policy_grpc
from mulligan.testing.processes import ServiceProcess, ServiceProcesses
from mulligan.testing.weights import sha256
from mulligan.trainer.learner.servicer import LearnerServicer
from mulligan.trainer.v1 import learner_service_pb2 as learner_pb
from mulligan.trainer.v1 import learner_service_pb2_grpc as learner_grpc
from tests.support.learning import server_settings
from tests.support.policy_backends import WITH_WEIGHTS, Running, restore, running
from tests.support.tiny_model import write_tiny_model

TASK = {"environment": "frozenlake-3x3", "task_id": "train/00000"}


class Refusal(NamedTuple):
    code: str
    reason: str
    metadata: dict[str, str]


async def refusal(call: Awaitable[Any]) -> Refusal:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = from_rpc_error(caught.value)
    assert error is not None, f"no ErrorInfo: {caught.value}"
    return Refusal(caught.value.code().name, error.reason, error.metadata)


@pytest.fixture(scope="module")
def env_server(shared_services: ServiceProcesses) -> ServiceProcess:
    return shared_services.start("env")


@pytest.fixture
async def env(env_server: ServiceProcess) -> AsyncIterator[env_grpc.EnvServiceStub]:
    async with grpc.aio.insecure_channel(env_server.address) as channel:
        yield env_grpc.EnvServiceStub(channel)


async def test_environments_and_episodes(env: env_grpc.EnvServiceStub) -> None:
    await env.StartEpisode(env_pb.StartEpisodeRequest(episode_id="good", **TASK))
    index = 0

    async def serves_on() -> None:
        nonlocal index
        request = env_pb.StepEpisodeRequest(episode_id="good", step_index=index, action="none")
        assert (await env.StepEpisode(request)).action == "invalid"
        index += 1

    def step(episode_id: str, step_index: int, action: str = "none") -> Awaitable[Any]:
        request = env_pb.StepEpisodeRequest(episode_id=episode_id, step_index=step_index, action=action)
        return env.StepEpisode(request)

    await serves_on()
    assert (await refusal(step("never-started", 0)))[:2] == ("NOT_FOUND", "UNKNOWN_EPISODE")
    await serves_on()
    skipped = await refusal(step("good", index + 1))
    assert skipped == ("FAILED_PRECONDITION", "STEP_SKIPPED", {"next_step_index": str(index)})
    await serves_on()
    assert (await step("good", 0)).action == "invalid", "repeated with the same action: the stored answer"
    assert (await refusal(step("good", 0, "```Up```")))[:2] == ("FAILED_PRECONDITION", "STEP_CONFLICT")
    await serves_on()
    negative = await refusal(step("good", -1))
    assert negative[:2] == ("INVALID_ARGUMENT", "INVALID_FIELD") and negative.metadata["field"] == "step_index"
    await serves_on()
    unknown = env_pb.StartEpisodeRequest(episode_id="e", environment="chess", task_id="train/00000")
    assert (await refusal(env.StartEpisode(unknown)))[:2] == ("NOT_FOUND", "UNKNOWN_ENVIRONMENT")
    await serves_on()


async def test_an_action_of_a_megabyte_is_an_action_and_one_of_five_is_refused(env: env_grpc.EnvServiceStub) -> None:
    await env.StartEpisode(env_pb.StartEpisodeRequest(episode_id="long", **TASK))
    megabyte = env_pb.StepEpisodeRequest(episode_id="long", step_index=0, action="x" * 1_000_000)
    answer = await env.StepEpisode(megabyte)
    assert (answer.action, answer.done) == ("invalid", False) and len(answer.observation) < 1000
    longer = env_pb.StepEpisodeRequest(episode_id="long", step_index=1, action="x" * 5_000_000)
    refused = await refusal(env.StepEpisode(longer))
    assert refused[:2] == ("INVALID_ARGUMENT", "INVALID_FIELD") and refused.metadata["field"] == "action"
    after = env_pb.StepEpisodeRequest(episode_id="long", step_index=1, action="```Up```")
    assert (await env.StepEpisode(after)).action.startswith("Up")


@pytest.fixture(params=WITH_WEIGHTS)
async def policy(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Running]:
    try:
        async with running(request.param, weights_folder=tmp_path) as served:
            yield served
    finally:
        await restore(request.param)


async def test_prompts(policy: Running) -> None:
    def asked(**prompt: Any) -> policy_pb.GenerateRequest:
        return policy_pb.GenerateRequest(sampling=policy_pb.SamplingParams(max_tokens=2), **prompt)

    def ids(*values: int) -> policy_pb.TokenIds:
        return policy_pb.TokenIds(ids=values)

    long = message_pb2.Message(role=message_pb2.ROLE_USER, content="A " * 1100)
    cases = {
        "empty": (asked(token_ids=ids()), "EMPTY_PROMPT"),
        "no messages": (asked(messages=policy_pb.Messages()), "EMPTY_PROMPT"),
        "id too high": (asked(token_ids=ids(5, 319)), "TOKEN_OUT_OF_VOCABULARY"),
        "negative id": (asked(token_ids=ids(5, -1)), "TOKEN_OUT_OF_VOCABULARY"),
        "fills the context": (asked(token_ids=ids(*[5] * 1024)), "PROMPT_TOO_LONG"),
        "messages too long": (asked(messages=policy_pb.Messages(messages=[long])), "PROMPT_TOO_LONG"),
    }
    async with grpc.aio.insecure_channel(policy.address) as channel:
        stub = policy_grpc.PolicyServiceStub(channel)
        for name, (request, reason) in cases.items():
            assert (await refusal(stub.Generate(request)))[:2] == ("INVALID_ARGUMENT", reason), name
            good = await stub.Generate(asked(token_ids=ids(5, 6, 7)))
            [completion] = good.completions
            assert 1 <= len(completion.token_ids) == len(completion.log_probs) <= 2, name


async def test_weights_of_another_model(policy: Running, tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in build_model(1).state_dict().items()}
    other = {name: torch.zeros(2, 2) if name.endswith("up_proj.weight") else value for name, value in tensors.items()}
    good = tmp_path / "good.safetensors"
    bad = tmp_path / "bad.safetensors"
    save_file(tensors, good)
    save_file(other, bad)

    def update(path: Path, fingerprint: str) -> admin_pb.UpdateWeightsRequest:
        return admin_pb.UpdateWeightsRequest(
            policy_version=1,
            kind=admin_pb.WEIGHTS_KIND_FULL,
            uri=path.resolve().as_uri(),
            sha256=sha256(path),
            fingerprint=fingerprint,
        )

    async with grpc.aio.insecure_channel(policy.address) as channel:
        admin = admin_grpc.PolicyAdminServiceStub(channel)
        stub = policy_grpc.PolicyServiceStub(channel)
        own = (await stub.GetPolicy(policy_pb.GetPolicyRequest())).policy.fingerprint
        for request in (update(bad, own), update(good, "f" * 64)):
            assert (await refusal(admin.UpdateWeights(request)))[:2] == ("FAILED_PRECONDITION", "MODEL_MISMATCH")
            assert (await stub.GetPolicy(policy_pb.GetPolicyRequest())).policy.policy_version == 0
            sampled = await stub.Generate(policy_pb.GenerateRequest(token_ids=policy_pb.TokenIds(ids=[5, 6])))
            assert sampled.completions[0].policy_versions[0].policy_version == 0
        assert (await admin.UpdateWeights(update(good, own))).policy_version == 1


@pytest.fixture
async def learner(tmp_path: Path) -> AsyncIterator[learner_grpc.LearnerServiceStub]:
    servicer = LearnerServicer(server_settings(tmp_path))
    server = grpc.aio.server(interceptors=[RequestInterceptor()])
    learner_grpc.add_LearnerServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield learner_grpc.LearnerServiceStub(channel)
    await server.stop(None)
    await servicer.close()


async def test_a_checkpoint_of_another_model(learner: learner_grpc.LearnerServiceStub, tmp_path: Path) -> None:
    ids: dict[str, Any] = {"learner_id": "learner", "owner": "run"}

    async def create(folder: Path, layers: int) -> None:
        source = str(write_tiny_model(folder, layers=layers))
        request = learner_pb.CreateLearnerRequest(model=learner_pb.ModelConfig(source=source), **ids)
        assert (await learner.CreateLearner(request)).next_sequence == 1

    await create(tmp_path / "two", 2)
    await learner.SaveCheckpoint(learner_pb.SaveCheckpointRequest(name="of-two", **ids))
    await learner.DeleteLearner(learner_pb.DeleteLearnerRequest(**ids))
    await create(tmp_path / "three", 3)
    load = learner_pb.LoadCheckpointRequest(name="of-two", **ids)
    assert await refusal(learner.LoadCheckpoint(load)) == (
        "FAILED_PRECONDITION",
        "CHECKPOINT_MISMATCH",
        {"name": "of-two"},
    )
    await learner.SaveCheckpoint(learner_pb.SaveCheckpointRequest(name="of-three", **ids))
    loaded = await learner.LoadCheckpoint(learner_pb.LoadCheckpointRequest(name="of-three", **ids))
    assert (loaded.next_sequence, loaded.optimizer_steps) == (1, 0)
