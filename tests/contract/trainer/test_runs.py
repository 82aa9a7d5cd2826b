"""The contract of RunService, over gRPC against four real processes: what it refuses, and that it serves on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any, NamedTuple

import grpc
import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.common.status import from_rpc_error
from mulligan.testing.loop import Loop, small_run
from mulligan.testing.processes import ServiceProcesses
from mulligan.trainer.client import RunClient
from mulligan.trainer.events import NoticeEvent, StateEvent
from mulligan.trainer.folder import RunState
from mulligan.trainer.settings import PoliciesSettings, TrainedModelSettings
from mulligan.trainer.v1 import run_config_pb2 as config_pb
from mulligan.trainer.v1 import run_service_pb2 as pb
from mulligan.trainer.v1 import run_service_pb2_grpc as pb_grpc
from mulligan.trainer.wire import settings_to_proto
from tests.support.waiting import until_async

DONE = small_run(steps=1, checkpoint_every=1)
LONG = small_run(steps=1000)


class Refusal(NamedTuple):
    code: str
    reason: str
    field: str


@pytest.fixture(scope="module")
def loop(shared_services: ServiceProcesses, tmp_path_factory: pytest.TempPathFactory) -> Loop:
    """With one run, "done", that is complete."""
    loop = Loop.start(shared_services, tmp_path_factory.mktemp("loop"))
    asyncio.run(loop.train("done", DONE))
    return loop


@pytest.fixture
async def client(loop: Loop) -> AsyncIterator[RunClient]:
    client = loop.client()
    yield client
    await client.close()


@pytest.fixture
async def stub(loop: Loop) -> AsyncIterator[pb_grpc.RunServiceStub]:
    async with grpc.aio.insecure_channel(loop.trainer.address) as channel:
        yield pb_grpc.RunServiceStub(channel)


async def refusal(stub: pb_grpc.RunServiceStub, call: Awaitable[Any]) -> Refusal:
    """What the call is refused with. The service serves on."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = from_rpc_error(caught.value)
    assert error is not None, f"no ErrorInfo: {caught.value}"
    served = (await stub.GetRun(pb.GetRunRequest(run_id="done"))).run
    assert (served.state, served.step) == (pb.RUN_STATE_COMPLETED, 1)
    return Refusal(caught.value.code().name, error.reason, error.metadata.get("field", ""))


async def first_of(stream: Any) -> Any:
    return await anext(aiter(stream))


@pytest.mark.parametrize("run_id", ["none", "", "../done", "done/", "a\nb"])
async def test_unknown_runs_are_not_found(stub: pb_grpc.RunServiceStub, run_id: str) -> None:
    for call in (
        stub.GetRun(pb.GetRunRequest(run_id=run_id)),
        stub.StopRun(pb.StopRunRequest(run_id=run_id)),
        stub.ResumeRun(pb.ResumeRunRequest(run_id=run_id)),
        stub.ListExperiences(pb.ListExperiencesRequest(run_id=run_id)),
        first_of(stub.WatchRun(pb.WatchRunRequest(run_id=run_id))),
    ):
        assert (await refusal(stub, call))[:2] == ("NOT_FOUND", "UNKNOWN_RUN")


_config: Any = config_pb.RunConfig  # its parts may be dicts
BAD_SETTINGS: dict[str, config_pb.RunConfig] = {
    "environment": config_pb.RunConfig(),
    "steps": _config(environment="x", steps=0),
    "seed": _config(environment="x", seed=-1),
    "rollout.temperature": _config(environment="x", rollout={"temperature": 0}),
    "rollout.top_p": _config(environment="x", rollout={"top_p": 1.5}),
    "evaluation.samples": _config(environment="x", evaluation={"samples": 0}),
    "optimizer.learning_rate": _config(environment="x", optimizer={"learning_rate": float("nan")}),
    "algorithm.memory_entries": _config(environment="x", algorithm={"memory_entries": -1}),
    "algorithm.second_attempt": _config(environment="x", algorithm={"second_attempt": 99}),
    "policies.actor": _config(environment="x", policies={"actor": "no name"}),
    "policies.reflector": _config(environment="x", policies={"actor": "one", "reflector": "one"}),
    "rollout.max_staleness": _config(environment="x", rollout={"max_staleness": 1}, deterministic=True),
    "model.dtype": _config(environment="x", model={"dtype": "float16"}),
}


@pytest.mark.parametrize("setting", list(BAD_SETTINGS))
async def test_a_bad_setting_is_named_and_starts_nothing(stub: pb_grpc.RunServiceStub, setting: str) -> None:
    call = stub.StartRun(pb.StartRunRequest(run_id="bad", config=BAD_SETTINGS[setting]))
    assert await refusal(stub, call) == ("INVALID_ARGUMENT", "INVALID_SETTING", setting)
    assert (await refusal(stub, stub.GetRun(pb.GetRunRequest(run_id="bad")))).reason == "UNKNOWN_RUN"


async def test_a_run_is_started_once(stub: pb_grpc.RunServiceStub) -> None:
    same = pb.StartRunRequest(run_id="done", config=settings_to_proto(DONE))
    assert (await stub.StartRun(same)).run.state == pb.RUN_STATE_COMPLETED
    other = pb.StartRunRequest(run_id="done", config=settings_to_proto(small_run(steps=2)))
    assert (await refusal(stub, stub.StartRun(other)))[:2] == ("ALREADY_EXISTS", "RUN_CONFLICT")
    resume = stub.ResumeRun(pb.ResumeRunRequest(run_id="done"))
    assert (await refusal(stub, resume))[:2] == ("FAILED_PRECONDITION", "RUN_COMPLETED")
    assert (await stub.StopRun(pb.StopRunRequest(run_id="done"))).run.state == pb.RUN_STATE_COMPLETED


async def test_a_trainer_trains_one_run_at_a_time(loop: Loop, client: RunClient, stub: pb_grpc.RunServiceStub) -> None:
    await client.start("long", LONG)
    for run_id, call in (
        ("other", stub.StartRun(pb.StartRunRequest(run_id="other", config=settings_to_proto(DONE)))),
        ("bad setting", stub.StartRun(pb.StartRunRequest(run_id="other", config=config_pb.RunConfig()))),
    ):
        expected = "LEARNER_OWNED" if run_id == "other" else "INVALID_SETTING"
        assert (await refusal(stub, call)).reason == expected
    with pytest.raises(DomainError) as caught:
        await client.start("other", DONE)
    assert (caught.value.reason, caught.value.metadata) == (Reason.LEARNER_OWNED, {"run_id": "long"})
    for again in (await client.start("long", LONG), await client.resume("long")):
        assert again.state is RunState.RUNNING, "repeating is harmless while it runs"
    await loop.journal_grows("long", 2000)
    await client.stop("long")
    await client.stop("long")
    events = [entry async for entry in client.watch("long")]
    assert events[-1].event == StateEvent(RunState.STOPPED)
    stopped = await client.get("long")
    assert stopped.state is RunState.STOPPED and 1 <= stopped.step < LONG.steps
    await client.start("other", DONE)
    await loop.ended(client, "other")
    assert (await client.start("long", LONG)).state is RunState.STOPPED, "only ResumeRun takes it up again"
    assert (await client.resume("long")).state is RunState.RUNNING
    await client.stop("long")
    assert [entry async for entry in client.watch("long", len(events))][-1].event == StateEvent(RunState.STOPPED)


NOWHERE = "nowhere"
BY_MEANING = {"memory_strategy": "similar_meaning"}


@pytest.mark.parametrize(
    ("run_id", "settings", "words"),
    [
        ("no-environment", DONE.model_copy(update={"environment": "chess"}), "UNKNOWN_ENVIRONMENT"),
        ("no-model", DONE.model_copy(update={"model": TrainedModelSettings(source=NOWHERE)}), "MODEL_NOT_FOUND"),
        (
            "no-embedder",
            small_run(algorithm=BY_MEANING),
            "algorithm.memory_strategy: the memory service has no embedder",
        ),
        ("no-actor", DONE.model_copy(update={"policies": PoliciesSettings(actor="nobody")}), "UNKNOWN_POLICY"),
    ],
)
async def test_what_ends_a_run_is_its_error(
    loop: Loop, client: RunClient, run_id: str, settings: Any, words: str
) -> None:
    if settings.model.source == NOWHERE:  # below its models folder, but not there
        model = settings.model.model_copy(update={"source": str(loop.folder / NOWHERE)})
        settings = settings.model_copy(update={"model": model})
    await client.start(run_id, settings)
    events = [entry.event async for entry in client.watch(run_id)]
    info = await client.get(run_id)
    assert info.state is RunState.FAILED and words in info.error
    assert events[-1] == StateEvent(RunState.FAILED, info.error)
    assert (await client.resume(run_id)).state is RunState.RUNNING
    assert [entry.event async for entry in client.watch(run_id)][-1] == StateEvent(RunState.FAILED, info.error)


async def test_events_are_taken_up_where_a_stream_broke(client: RunClient) -> None:
    entries = [entry async for entry in client.watch("done")]
    assert [entry.number for entry in entries] == list(range(1, len(entries) + 1))
    async with asyncio.timeout(60):
        for after in range(1, len(entries) + 1):
            assert [entry async for entry in client.watch("done", after)] == entries[after:]


async def test_lists_are_paged(loop: Loop, client: RunClient, stub: pb_grpc.RunServiceStub) -> None:
    everything = [info.run_id for info in await client.runs()]
    assert everything[-1] == "done", "newest first"
    found: list[str] = []
    token = ""
    while len(found) <= len(everything):
        page = await stub.ListRuns(pb.ListRunsRequest(page_size=1, page_token=token))
        found += [run.run_id for run in page.runs]
        token = page.next_page_token
        if not token:
            break
    assert found == everything
    chains = loop.experiences("done")
    ids: list[str] = []
    token = ""
    while len(ids) <= len(chains):
        request = pb.ListExperiencesRequest(run_id="done", page_size=3, page_token=token)
        answer = await stub.ListExperiences(request)
        ids += [experience.experience_id for experience in answer.experiences]
        token = answer.next_page_token
        if not token:
            break
    assert ids == [chain.experience_id for chain in chains]
    nothing = await stub.ListExperiences(pb.ListExperiencesRequest(run_id="done", step=7))
    assert not nothing.experiences and not nothing.next_page_token


@pytest.mark.parametrize("token", ["nonsense", "é", "1", "-1/0", "1/-1", "0/x", "/", "²/0"])
async def test_a_bad_page_token_is_refused(stub: pb_grpc.RunServiceStub, token: str) -> None:
    for call in (
        stub.ListRuns(pb.ListRunsRequest(page_token=token)),
        stub.ListExperiences(pb.ListExperiencesRequest(run_id="done", page_token=token)),
    ):
        assert (await refusal(stub, call))[:2] == ("INVALID_ARGUMENT", "BAD_PAGE_TOKEN")


async def test_bad_fields_are_named(stub: pb_grpc.RunServiceStub) -> None:
    for call, field in (
        (stub.ListRuns(pb.ListRunsRequest(page_size=1001)), "page_size"),
        (stub.ListExperiences(pb.ListExperiencesRequest(run_id="done", page_size=-1)), "page_size"),
        (first_of(stub.WatchRun(pb.WatchRunRequest(run_id="done", after_event=-1))), "after_event"),
        (stub.Evaluate(pb.EvaluateRequest(environment="frozenlake-3x3", max_tokens=0)), "max_tokens"),
        (stub.Evaluate(pb.EvaluateRequest(environment="frozenlake-3x3", run_id="done", policy="actor")), "policy"),
    ):
        assert await refusal(stub, call) == ("INVALID_ARGUMENT", "INVALID_FIELD", field)


async def test_bad_evaluations_are_refused(stub: pb_grpc.RunServiceStub) -> None:
    unknown = stub.Evaluate(pb.EvaluateRequest(environment="chess"))
    assert (await refusal(stub, unknown))[:2] == ("NOT_FOUND", "UNKNOWN_ENVIRONMENT")
    nobody = stub.Evaluate(pb.EvaluateRequest(environment="frozenlake-3x3", policy="nobody"))
    assert (await refusal(stub, nobody))[:2] == ("NOT_FOUND", "UNKNOWN_POLICY")
    setting = stub.Evaluate(
        pb.EvaluateRequest(environment="frozenlake-3x3", config=config_pb.EvaluationConfig(samples=0))
    )
    assert await refusal(stub, setting) == ("INVALID_ARGUMENT", "INVALID_SETTING", "samples")


async def test_a_running_run_says_what_it_does(client: RunClient) -> None:
    """With counts of its chains, its tokens and its attempts; a run that has ended does nothing."""
    counted = {"evaluating attempts": 4, "sampling chains": 8}
    others = {"learning tokens", "writing to the memory", "publishing the weights", "saving a checkpoint"}
    seen: dict[str, int] = {}
    await client.start("busy", small_run(steps=1000, evaluation={"every": 1}))  # each of them again and again

    async def all_seen() -> bool:
        now = (await client.get("busy")).activity
        assert 0 <= now.done <= max(now.total, 0) and now.seconds >= 0
        if now.doing:
            seen[now.doing] = now.total
        return counted.keys() | others <= {doing.removesuffix(", seconds") for doing in seen}

    await until_async(all_seen)
    assert {doing: seen[doing] for doing in counted} == counted and seen["learning tokens"] > 100
    await client.stop("busy")
    await until_async(lambda: _has_ended(client, "busy"))
    assert (await client.get("busy")).activity.doing == "" == (await client.get("done")).activity.doing


async def _has_ended(client: RunClient, run_id: str) -> bool:
    return (await client.get(run_id)).state is not RunState.RUNNING


@pytest.mark.long
async def test_a_run_that_waits_for_a_service_says_so(loop: Loop, client: RunClient) -> None:
    """Each service that it uses; and when it is back."""
    await client.start("waits", small_run(steps=1000, checkpoint_every=1))
    for service in (loop.env, loop.policy, loop.memory):
        service.kill()

        async def waits(address: str = service.address) -> bool:
            return f"waiting for {address}: " in (await client.get("waits")).paused

        async def goes_on() -> bool:
            return (await client.get("waits")).paused == ""

        await until_async(waits, 60)
        assert (await client.get("waits")).activity.doing, "what it waits with"
        service.restart()
        await until_async(goes_on, 60)
    await client.stop("waits")
    texts = [entry.event.text async for entry in client.watch("waits") if isinstance(entry.event, NoticeEvent)]
    for service in (loop.env, loop.policy, loop.memory):
        assert any(text.startswith(f"{service.address} answers again, after ") for text in texts), texts
    assert (await client.get("waits")).paused == ""
