"""Callers of the policy service that vanish: a case for each call that changes something or samples."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from mulligan.common.inference import PolicyState
from mulligan.policy import servicer
from mulligan.policy.policies import Policies
from mulligan.policy.v1 import policy_admin_service_pb2 as admin_pb
from mulligan.policy.v1 import policy_admin_service_pb2_grpc as admin_grpc
from mulligan.policy.v1 import policy_service_pb2 as pb
from mulligan.policy.v1 import policy_service_pb2_grpc as pb_grpc
from tests.support.scripted import Running, started
from tests.support.vanishing import Case, Vanishing, at_each_wait, vanishing
from tests.support.waiting import until


@dataclass
class _Served:
    running: Running
    stub: pb_grpc.PolicyServiceStub
    admin: admin_grpc.PolicyAdminServiceStub
    folder: Path

    @property
    def policies(self) -> Policies:
        return self.running.served.policies

    async def changed(self) -> None:
        """A change goes on without its caller."""
        await until(lambda: not self.policies._tasks)

    async def nothing_runs(self, answer: Any = None) -> None:
        backend = self.running.served.backend
        await until(lambda: len(backend.ended) == len(backend.asks))
        deployment = self.running.served.deployment
        assert (deployment.calls, deployment.in_flight) == (0, 0)

    def weights(self, version: int) -> admin_pb.UpdateWeightsRequest:
        path = self.folder / f"{version}.weights"
        path.write_bytes(b"weights %d" % version)
        return admin_pb.UpdateWeightsRequest(
            policy_version=version,
            kind=admin_pb.WEIGHTS_KIND_FULL,
            uri=path.as_uri(),
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            fingerprint="one",
        )

    async def versions(self) -> dict[int, int]:
        """Their states."""
        listed = await self.admin.ListVersions(admin_pb.ListVersionsRequest())
        found: dict[int, int] = {version.policy_version: version.state for version in listed.versions}
        assert len(found) == len(listed.versions), "each once"
        return found


@asynccontextmanager
async def _serving(folder: Path, caller: Vanishing) -> AsyncIterator[_Served]:
    weights = folder / "weights"
    weights.mkdir()
    settings: dict[str, Any] = {"state_folder": folder / "state", "weights_folder": weights}
    async with started(max_models=3, session_idle_seconds=0.01, **settings) as running:
        policies = running.served.policies
        async with vanishing(lambda server: servicer.add_to_server(server, policies), caller) as (_, channel):
            stubs = pb_grpc.PolicyServiceStub(channel), admin_grpc.PolicyAdminServiceStub(channel)
            yield _Served(running, *stubs, weights)


def _asked(**changes: Any) -> pb.GenerateRequest:
    asked = pb.GenerateRequest(n=2, session_id="s", sampling=pb.SamplingParams(temperature=1.0), **changes)
    asked.token_ids.ids.extend([1, 2, 3])
    return asked


async def _sample(make: Callable[[_Served], Any], folder: Path, caller: Vanishing) -> None:
    """Calls that hold the policy while they run."""
    async with _serving(folder, caller) as its:
        for caller.in_turns in (False, True):
            await at_each_wait(caller, lambda: make(its), its.nothing_runs)
        await its.admin.ReleaseMemory(admin_pb.ReleaseMemoryRequest())  # waits for calls in flight


def _many() -> pb.GenerateManyRequest:
    return pb.GenerateManyRequest(requests=[_asked(), _asked()])


def _tokenized() -> pb.TokenizeRequest:
    request = pb.TokenizeRequest()
    request.text = "some words"
    return request


def _scored() -> pb.ScoreRequest:
    request = pb.ScoreRequest()
    request.sequences.add().ids.extend([1, 2, 3])
    return request


async def load_model(folder: Path, caller: Vanishing) -> None:
    name = "p"

    async def loaded(answer: Any) -> None:
        nonlocal name
        await its.changed()
        if answer is None and len(list(its.policies.deployments)) == 1:  # whose request nobody had read
            return
        await its.running.serves("two", 0, name)
        assert len(list(its.policies.deployments)) == 2
        await its.running.client.unload_model(name)
        name = f"p-{uuid4().hex}"

    async with _serving(folder, caller) as its:
        call = lambda: its.admin.LoadModel(admin_pb.LoadModelRequest(policy=name, model="two"))  # noqa: E731
        await at_each_wait(caller, call, loaded)


async def unload_model(folder: Path, caller: Vanishing) -> None:
    async def load() -> None:
        await its.admin.LoadModel(admin_pb.LoadModelRequest(policy="p", model="two"))

    async def unloaded(answer: Any) -> None:
        await its.changed()
        if len(list(its.policies.deployments)) == 2:  # nobody had read the request
            assert answer is None
            await its.running.serves("two", 0, "p")
            return
        assert its.running.opened["two"].closed
        await load()

    async with _serving(folder, caller) as its:
        await load()
        unload = admin_pb.UnloadModelRequest(policy="p")
        await at_each_wait(caller, lambda: its.admin.UnloadModel(unload), unloaded)


async def upload_weights(folder: Path, caller: Vanishing) -> None:
    content = (2).to_bytes(8, "little") + b"{}" + bytes(100)
    header = admin_pb.UploadWeightsRequest.Header(
        kind=admin_pb.WEIGHTS_KIND_FULL, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest()
    )
    pieces = [admin_pb.UploadWeightsRequest(chunk=content[begin : begin + 40]) for begin in range(0, 110, 40)]
    messages = [admin_pb.UploadWeightsRequest(header=header), *pieces]

    async def nothing_left(answer: Any) -> None:
        uploads = its.policies.uploads
        if answer is not None:
            await uploads.remove(answer.uri)
        place = folder / "state" / "uploads"
        await until(lambda: uploads.reserved_bytes == 0 and list(place.iterdir()) == [])

    async with _serving(folder, caller) as its:
        assert await at_each_wait(caller, lambda: its.admin.UploadWeights(iter(messages)), nothing_left) > 5


async def update_weights(folder: Path, caller: Vanishing) -> None:
    version = 1

    async def updated(answer: Any) -> None:
        nonlocal version
        await its.changed()
        again = await its.admin.UpdateWeights(its.weights(version))
        assert answer is None or answer == again
        await its.running.serves("one", version)
        assert list(await its.versions()) == list(range(version, -1, -1))
        version += 1

    async with _serving(folder, caller) as its:
        await at_each_wait(caller, lambda: its.admin.UpdateWeights(its.weights(version)), updated)


async def rollback(folder: Path, caller: Vanishing) -> None:
    version = 1
    back = admin_pb.RollbackRequest(policy_version=0)

    async def rolled_back(answer: Any) -> None:
        nonlocal version
        await its.changed()
        await its.admin.Rollback(back)
        await its.running.serves("one", 0)
        states = await its.versions()
        assert states.pop(0) == admin_pb.VERSION_STATE_SERVING
        assert set(states.values()) == {admin_pb.VERSION_STATE_WITHDRAWN}
        version += 1
        await its.admin.UpdateWeights(its.weights(version))

    async with _serving(folder, caller) as its:
        await its.admin.UpdateWeights(its.weights(version))
        await at_each_wait(caller, lambda: its.admin.Rollback(back), rolled_back)


async def release_memory(folder: Path, caller: Vanishing) -> None:
    """While a call is in flight, for which the release waits."""
    await _released_or_resumed(folder, caller, releases=True)


async def resume_memory(folder: Path, caller: Vanishing) -> None:
    await _released_or_resumed(folder, caller, releases=False)


async def _released_or_resumed(folder: Path, caller: Vanishing, *, releases: bool) -> None:
    async def release() -> None:
        await its.admin.ReleaseMemory(admin_pb.ReleaseMemoryRequest())
        assert its.running.served.deployment.state is PolicyState.RELEASED

    async def resume() -> None:
        await its.admin.ResumeMemory(admin_pb.ResumeMemoryRequest())
        await its.running.serves("one", 0)

    async def done(answer: Any) -> None:
        await its.changed()
        for step in (release, resume) if releases else (resume, release):  # what was done is not done again
            await step()

    async with _serving(folder, caller) as its:
        if releases:
            await at_each_wait(caller, lambda: its.admin.ReleaseMemory(admin_pb.ReleaseMemoryRequest()), done)
        else:
            await release()
            await at_each_wait(caller, lambda: its.admin.ResumeMemory(admin_pb.ResumeMemoryRequest()), done)
            await resume()


_SERVICE = "/mulligan.policy.v1.PolicyService/"
_ADMIN = "/mulligan.policy.v1.PolicyAdminService/"
CASES: dict[str, Case] = {
    f"{_SERVICE}Generate": partial(_sample, lambda its: its.stub.Generate(_asked())),
    f"{_SERVICE}GenerateMany": partial(_sample, lambda its: its.stub.GenerateMany(_many())),
    f"{_SERVICE}StreamGenerate": partial(
        _sample, lambda its: its.stub.StreamGenerate(pb.StreamGenerateRequest(request=_asked()))
    ),
    f"{_SERVICE}Score": partial(_sample, lambda its: its.stub.Score(_scored())),
    f"{_SERVICE}Tokenize": partial(_sample, lambda its: its.stub.Tokenize(_tokenized())),
    f"{_ADMIN}LoadModel": load_model,
    f"{_ADMIN}UnloadModel": unload_model,
    f"{_ADMIN}UploadWeights": upload_weights,
    f"{_ADMIN}UpdateWeights": update_weights,
    f"{_ADMIN}Rollback": rollback,
    f"{_ADMIN}ReleaseMemory": release_memory,
    f"{_ADMIN}ResumeMemory": resume_memory,
}
