"""LoadModel and UnloadModel: what they load, what they refuse, and what is left after a failure or a restart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from safetensors.numpy import save_file

from mulligan.common.errors import Code, DomainError, Reason
from mulligan.common.inference import (
    CallOptions,
    CanaryProbe,
    PublishedWeights,
    SamplingParams,
    VersionState,
    WeightsKind,
)
from mulligan.policy.config import PolicySettings
from mulligan.policy.policies import Policies
from mulligan.policy.v1 import policy_admin_service_pb2 as pb
from mulligan.policy.v1 import policy_admin_service_pb2_grpc as pb_grpc
from mulligan.testing.weights import full_weights, load, plain_log_probs, sha256
from tests.support.llama_model import write_llama_model
from tests.support.policy import serving
from tests.support.scripted import Opened, Running, refused, started
from tests.support.settings import model_settings
from tests.support.tiny_model import write_tiny_model
from tests.support.waiting import until

PROMPT = [1, 2, 3]
PLAIN = SamplingParams()
HOSTS: dict[str, Any] = {"allowed_addresses": [f"http://h:{number}" for number in range(10)]}


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    async with started(**HOSTS) as found:
        yield found


async def test_versions_go_on_and_never_repeat(running: Running) -> None:
    load_model = running.client.load_model
    assert await load_model("actor", "two") == (1, "two")
    await running.serves("two", 1)
    assert await load_model("actor", "one") == (2, "one")
    await running.serves("one", 2)
    assert await load_model("other", "one") == (0, "one")
    await running.serves("one", 0, "other")
    assert await load_model("other", "two") == (1, "two")
    await running.serves("one", 2)


async def test_the_same_model_again_changes_nothing(running: Running) -> None:
    assert await running.client.load_model("actor", "one") == (0, "one")
    assert len(running.opened.backends) == 1
    for _ in range(2):
        assert await running.client.load_model("actor", "one", "", {"context_length": 20}) == (1, "one")
    assert len(running.opened.backends) == 2
    assert (await running.client.info()).context_length == 20


async def test_options_are_put_over_the_policy_s_own_settings() -> None:
    async with started(
        context_length=24, adapters={"a": "x"}, policies={"other": {"max_queue": 7}}, **HOSTS
    ) as running:
        await running.client.load_model("actor", "two", "", {"adapters.b": "y", "openai.extra_body": {"top_k": 1}})
        settings: Any = running.served.deployment.settings
        assert (settings.context_length, settings.adapters) == (24, {"a": "x", "b": "y"})
        assert settings.openai.extra_body == {"top_k": 1}
        await running.client.load_model("actor", "three", "sglang", {"sglang.servers": ["http://h:1"], "max_queue": 0})
        settings = running.served.deployment.settings
        assert (settings.adapters, settings.openai.extra_body) == ({"a": "x"}, {}), "the settings' own, not the last"
        assert (settings.sglang.servers, settings.max_queue) == (("http://h:1",), 0)
        assert (await running.client.info()).backend == "sglang"
        await running.client.load_model("other", "two")
        assert running.served.policies.get("other").newest.settings.max_queue == 7


async def test_a_credential_is_not_sent_to_an_address_that_it_was_not_given_for() -> None:
    endpoint = {"base_url": "https://good", "api_key": "secret"}
    servers = {"api_key": "s", "admin_api_key": "a"}
    allowed = ["https://evil", "http://evil", "https://mine"]
    async with started(backend="openai", openai=endpoint, sglang=servers, allowed_addresses=allowed) as running:
        await running.client.load_model("actor", "two", "", {"openai.without": ["seed"]})
        settings: Any = running.served.deployment.settings
        kept = settings.openai.api_key
        assert kept is not None and kept.get_secret_value() == "secret"
        await running.client.load_model("actor", "two", "", {"openai.base_url": "https://evil"})
        settings = running.served.deployment.settings
        assert settings.openai.api_key is None
        await running.client.load_model("actor", "two", "sglang", {"sglang.servers": ["http://evil"]})
        settings = running.served.deployment.settings
        assert (settings.sglang.api_key, settings.sglang.admin_api_key) == (None, None)
        options = {"sglang.servers": ["https://mine"], "sglang.api_key": "new"}
        await running.client.load_model("actor", "two", "sglang", options)
        settings = running.served.deployment.settings
        given = settings.sglang.api_key
        assert given is not None and given.get_secret_value() == "new"


async def test_prompts_go_to_no_address_but_those_of_the_settings() -> None:
    endpoint = {"base_url": "https://good/v1"}
    allowed: dict[str, Any] = {"allowed_addresses": ["https://also-good/v1", "http://engine:1", "http://engine:2/"]}
    async with started(backend="openai", openai=endpoint, **allowed) as running:
        load_model = running.client.load_model
        for bad in ("https://evil/v1", "https://also-good/v1/evil", "https://also-good", ""):
            for name in ("actor", "new"):
                error = await refused(
                    load_model(name, "two", "openai", {"openai.base_url": bad}), Reason.INVALID_SETTING
                )
                assert error.metadata["field"] == "openai.base_url" and "allowed_addresses" in error.message
        for field, value in (("servers", ["http://engine:1", "http://evil"]), ("router", "http://evil")):
            options = {"sglang.servers": ["http://engine:1"], f"sglang.{field}": value}
            error = await refused(load_model("new", "two", "sglang", options), Reason.INVALID_SETTING)
            assert error.metadata["field"] == f"sglang.{field}"
        assert [info.name for info in await running.client.policies()] == ["actor"]
        for good in ("https://good/v1", "https://also-good/v1/"):
            await load_model("actor", "two", "", {"openai.base_url": good})
        await load_model("new", "two", "sglang", {"sglang.servers": ["http://engine:1", "http://engine:2"]})


async def test_no_two_models_set_the_weights_of_one_server() -> None:
    first = {"servers": ("http://h:1", "http://h:2")}
    second = {"servers": ("http://h:3",)}
    policies = {"other": {"backend": "sglang", "sglang": second, "model": "two"}}
    async with started(backend="sglang", sglang=first, policies=policies, **HOSTS) as running:
        for name, servers in (("actor", None), ("new", ["http://h:4", "http://h:3"]), ("other", ["http://h:2/"])):
            options = {} if servers is None else {"sglang.servers": servers}
            call = running.client.load_model(name, "three", "sglang", options)
            error = await refused(call, Reason.INVALID_SETTING)
            assert error.metadata["field"] == "sglang.servers"
        await running.serves("one", 0)
        await running.client.load_model("actor", "three", "", {"sglang.servers": ["http://h:5"]})
        await until(lambda: running.served.policies.get().info.draining_models == 0)
        await running.client.load_model("new", "four", "sglang", {"sglang.servers": ["http://h:1"]})
        running.opened.go_on.clear()
        options = {"sglang.servers": ["http://h:6"]}
        opening = asyncio.create_task(running.client.load_model("newer", "five", "sglang", options))
        await until(lambda: "five" in running.opened.asked)
        await refused(running.client.load_model("newest", "six", "sglang", options), Reason.INVALID_SETTING)
        running.opened.go_on.set()
        assert await opening == (0, "five")
    plain = {"model": "one", "backend": "sglang", "sglang": second, "policies": policies}
    settings = PolicySettings.model_validate(plain)
    with pytest.raises(ExceptionGroup, match="http://h:3 serves the policy actor"):
        await Policies.open(settings, Opened().create)


async def test_a_server_has_one_policy_that_sets_its_weights_and_one_guest() -> None:
    second = {"backend": "sglang", "model": "two", "sglang": {"servers": ("http://h:1",), "adapters_only": True}}
    settings: dict[str, Any] = {"sglang": {"servers": ("http://h:1",)}, "policies": {"second": second}}
    async with started(backend="sglang", **settings, **HOSTS) as running:
        await running.serves("one", 0)
        await running.serves("two", 0, "second")
        guest: dict[str, Any] = {"sglang.servers": ["http://h:1"], "sglang.adapters_only": True}
        error = await refused(running.client.load_model("third", "three", "sglang", guest), Reason.INVALID_SETTING)
        assert error.message == (
            "sglang.servers: http://h:1 serves the policy second, and a server has one guest (adapters_only)"
        )
        owner = {"sglang.servers": ["http://h:1"]}
        error = await refused(running.client.load_model("third", "three", "sglang", owner), Reason.INVALID_SETTING)
        assert "serves the policy actor, and a server holds one model's weights" in error.message
        error = await refused(running.client.release_memory(), Reason.UNSUPPORTED_OPTION)
        assert error.message == "policy: second is a guest on its servers (adapters_only): unload it first"
        for name, options in (("actor", guest), ("second", owner | {"sglang.adapters_only": False})):
            await refused(running.client.load_model(name, "three", "sglang", options), Reason.INVALID_SETTING)
        lonely = {"sglang.adapters_only": True}
        error = await refused(running.client.load_model("third", "three", "sglang", lonely), Reason.INVALID_SETTING)
        assert error.metadata["field"] == "sglang.adapters_only" and "it needs `servers`" in error.message
        await running.client.unload_model("second")
        await running.client.release_memory()
        call = running.client.load_model("second", "two", "sglang", guest)
        await refused(call, Reason.ENGINE_UNAVAILABLE, Code.UNAVAILABLE)
        await running.client.resume_memory()
        await running.client.load_model("second", "two", "sglang", guest)
        await running.serves("two", 0, "second")


async def test_guests_are_opened_after_the_policies_of_their_servers(tmp_path: Path) -> None:
    early = {"backend": "sglang", "model": "two", "sglang": {"servers": ("http://h:1",), "adapters_only": True}}
    settings: dict[str, Any] = {"sglang": {"servers": ("http://h:1",)}, "policies": {"a-guest": early}}
    async with started(backend="sglang", state_folder=tmp_path, **settings, **HOSTS) as running:
        assert running.opened.asked == ["one", "two"]
        await running.client.load_model("owner", "three", "sglang", {"sglang.servers": ["http://h:2"]})
        options = {"sglang.servers": ["http://h:2"], "sglang.adapters_only": True}
        await running.client.load_model("another", "four", "sglang", options)
    async with started(backend="sglang", state_folder=tmp_path, **settings, **HOSTS) as running:
        assert set(running.opened.asked[:2]) == {"one", "three"} and set(running.opened.asked[2:]) == {"two", "four"}


async def test_a_server_is_free_when_the_model_of_its_policy_is_closed(running: Running) -> None:
    load_model = running.client.load_model
    servers = [{"sglang.servers": [f"http://h:{number}"]} for number in range(3)]
    await load_model("other", "two", "sglang", servers[0])
    running.opened["two"].may_close.clear()
    await load_model("other", "three", "sglang", servers[1])
    await until(lambda: running.opened["two"].closings == 1)
    await refused(load_model("new", "four", "sglang", servers[0]), Reason.INVALID_SETTING)
    running.opened["two"].may_close.set()
    await until(lambda: running.served.policies.get("other").info.draining_models == 0)
    await load_model("new", "four", "sglang", servers[0])

    running.opened["three"].may_close.clear()
    unloading = asyncio.create_task(running.client.unload_model("other"))
    await until(lambda: running.opened["three"].closings == 1)
    await refused(load_model("newer", "five", "sglang", servers[1]), Reason.INVALID_SETTING)
    running.opened["three"].may_close.set()
    await unloading
    await load_model("newer", "five", "sglang", servers[1])


@pytest.mark.parametrize(
    ("backend", "options", "field"),
    [
        ("tgi", {}, "backend"),
        ("../x", {}, "backend"),
        ("", {"context_length": -1}, "context_length"),
        ("", {"context_length": "many"}, "context_length"),
        ("", {"contxt_length": 1}, "contxt_length"),
        ("", {"sglang.servrs": []}, "sglang.servrs"),
        ("", {"nothing.at.all": 1}, "nothing.at.all"),
        ("", {"context_length.x": 1}, "context_length.x"),
        ("", {"openai": {}}, "openai"),
        ("", {"sglang": {}}, "sglang"),
        ("", {"model": "x"}, "model"),
        ("", {"backend": "openai"}, "backend"),
        ("", {"state_folder": "/x"}, "state_folder"),
        ("", {"sglang.python": "/bin/sh"}, "sglang.python"),
        ("", {"sglang.flags": ["--trust-remote-code"]}, "sglang.flags"),
        ("", {"sglang.environment": {"LD_PRELOAD": "x"}}, "sglang.environment"),
        ("", {"sglang.environment.LD_PRELOAD": "x"}, "sglang.environment.LD_PRELOAD"),
        ("", {"sglang.folder": "/"}, "sglang.folder"),
    ],
)
async def test_bad_settings_are_named(running: Running, backend: str, options: dict[str, Any], field: str) -> None:
    error = await refused(running.client.load_model("actor", "two", backend, options), Reason.INVALID_SETTING)
    assert error.metadata["field"] == field, error
    await running.serves("one", 0)


async def test_what_no_client_of_ours_would_send(running: Running) -> None:
    async with grpc.aio.insecure_channel(running.served.address) as channel:
        stub = pb_grpc.PolicyAdminServiceStub(channel)
        for request, reason in (
            (pb.LoadModelRequest(policy="actor", model="two", options={"max_queue": "{"}), "INVALID_SETTING"),
            (pb.LoadModelRequest(policy="actor", model="two", options={"max_queue": "[" * 10**5}), "INVALID_SETTING"),
            (pb.LoadModelRequest(policy="../up", model="two"), "INVALID_FIELD"),
            (pb.LoadModelRequest(policy="", model="two"), "INVALID_FIELD"),
            (pb.LoadModelRequest(policy="actor", model=""), "INVALID_FIELD"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.LoadModel(request)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert reason.encode() in dict(caught.value.trailing_metadata() or ())["grpc-status-details-bin"]


async def test_folders_are_loaded_from_below_the_models_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "models"
    outside = tmp_path / "outside"
    for folder in (models / "good", outside / "model", tmp_path / "here" / "model"):
        folder.mkdir(parents=True)
    (models / "link-in").symlink_to(models / "good")
    (models / "link-out").symlink_to(outside / "model")
    monkeypatch.chdir(tmp_path)
    bad = [outside / "model", models, models / "link-out", models / ".." / "outside" / "model", "here/model", "here"]
    bad += ["/nowhere", "./x", "~/x", "../x", "a/b/c", "a\\b", "a b", ".", "x/", "file:///x", "a/../here", "\x00"]
    async with started(models_folder=models, model="one") as running:
        for model in bad:
            await refused(running.client.load_model("actor", str(model)), Reason.BAD_MODEL)
            await refused(
                running.client.load_model("actor", "hub/id", "", {"adapters": {"a": str(model)}}), Reason.BAD_MODEL
            )
        await running.serves("one", 0)
        for model in (models / "good", models / "link-in", "embedded", "hub-id", "owner/name-1.5_x"):
            await running.client.load_model("actor", str(model), "", {"adapters": {"a": str(models / "good")}})
        await running.client.load_model("actor", "/endpoint/calls/it/so", "openai")
    async with started() as running:
        await refused(running.client.load_model("actor", str(models / "good")), Reason.BAD_MODEL)
        await running.client.load_model("actor", "owner/name")


async def test_a_model_that_cannot_be_served_leaves_all_as_it_was(running: Running) -> None:
    error = await refused(running.client.load_model("actor", "bad-one"), Reason.UNSUPPORTED_MODEL)
    assert error.message == "bad-one (transformers): bad-one is bad"
    await refused(running.client.load_model("new", "bad-one"), Reason.UNSUPPORTED_MODEL)
    await running.serves("one", 0)
    assert [info.name for info in await running.client.policies()] == ["actor"]
    assert await running.client.load_model("actor", "two") == (1, "two")
    assert await running.client.load_model("new", "two") == (0, "two")


async def test_a_model_that_cannot_be_recorded_leaves_the_weights_that_served(tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    save_file({"w": np.zeros(3, np.float32)}, weights)
    canary = (CanaryProbe((1, 2, 3), (-1.0, -1.0)),)
    trained = PublishedWeights(1, WeightsKind.FULL, weights.as_uri(), sha256(weights), "one", canary)
    record = tmp_path / "state" / "policies" / "actor" / "model.json"
    async with started(weights_folder=tmp_path, state_folder=tmp_path / "state") as running:
        await running.client.update_weights(trained)
        record.mkdir()
        with pytest.raises(OSError, match=r"model\.json"):
            await running.served.policies.load_model("actor", "two")
        assert running.opened["two"].closed
        await running.serves("one", 1)
        [newest, *_] = await running.client.versions()
        assert (newest.policy_version, newest.state) == (1, VersionState.SERVING)
        record.rmdir()
    async with started(weights_folder=tmp_path, state_folder=tmp_path / "state") as running:
        await running.serves("one", 1)


async def test_loads_of_one_policy_come_one_after_the_other(running: Running) -> None:
    running.opened.go_on.clear()
    names = ["two", "bad", "three", "three", "four"]
    loads = [asyncio.create_task(running.client.load_model("actor", name)) for name in names]
    other = asyncio.create_task(running.client.load_model("other", "two"))
    await until(lambda: len(running.opened.asked) == 3)  # the one that serves, and the first of each policy
    await running.serves("one", 0)
    running.opened.go_on.set()
    assert await other == (0, "two"), "policies do not wait for one another"
    results = await asyncio.gather(*loads, return_exceptions=True)
    assert isinstance(results.pop(1), DomainError)
    versions: dict[int, str] = {}
    for name, result in zip(["two", "three", "three", "four"], results, strict=True):
        assert isinstance(result, tuple)
        versions.setdefault(result[0], result[1])
        assert result[1] == name == versions[result[0]]
    assert sorted(versions) == list(range(1, len(versions) + 1))
    await running.serves(versions[max(versions)], max(versions))


async def test_a_caller_who_leaves_does_not_leave_half_a_model(running: Running) -> None:
    running.opened.go_on.clear()
    load = asyncio.create_task(running.client.load_model("actor", "two"))
    await until(lambda: "two" in running.opened.asked)
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load
    await running.serves("one", 0)
    running.opened.go_on.set()
    await until(lambda: running.served.policies.get().info.model == "two")
    await running.serves("two", 1)
    assert await running.client.load_model("actor", "two") == (1, "two")


async def test_a_service_that_stops_while_it_loads_leaves_nothing_behind() -> None:
    opened = Opened()
    async with started(opened) as running:
        opened.go_on.clear()
        load = asyncio.create_task(running.client.load_model("actor", "two"))
        await until(lambda: "two" in opened.asked)
    with pytest.raises(asyncio.CancelledError):
        await load
    assert [backend.closed for backend in opened.backends] == [True]


async def test_a_model_that_waits_for_a_change_is_closed_when_its_load_is_cancelled(running: Running) -> None:
    policy = running.served.policies.get()
    go_on = asyncio.Event()
    changing = asyncio.create_task(policy.change(lambda _: go_on.wait()))
    load = asyncio.create_task(policy.load(model_settings(model="two")))
    await until(lambda: len(running.opened.backends) == 2)
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load
    assert running.opened["two"].closed and not running.opened.folders[1].exists()
    go_on.set()
    await changing
    await running.serves("one", 0)


async def test_a_model_whose_memory_is_released_is_not_replaced(running: Running) -> None:
    await running.served.policies.release_memory()
    error = await refused(running.client.load_model("actor", "two"), Reason.ENGINE_UNAVAILABLE, Code.UNAVAILABLE)
    assert "ResumeMemory" in error.message
    await running.served.policies.resume_memory()
    assert await running.client.load_model("actor", "two") == (1, "two")


async def test_a_policy_is_unloaded_when_its_calls_have_finished(running: Running) -> None:
    await running.client.load_model("other", "two")
    backend = running.opened["two"]
    options = CallOptions(policy="other")
    backend.go_on.clear()
    call = asyncio.create_task(running.client.generate(PROMPT, PLAIN, options))
    await until(lambda: len(backend.asks) == 1)
    unloading = asyncio.create_task(running.client.unload_model("other"))
    await until(lambda: "other" not in [deployment.name for deployment in running.served.policies.deployments])
    await refused(running.client.generate(PROMPT, PLAIN, options), Reason.UNKNOWN_POLICY, Code.NOT_FOUND)
    assert not unloading.done() and not backend.closed
    backend.go_on.set()
    assert (await call).token_ids
    await unloading
    assert backend.closed
    await refused(running.client.unload_model("other"), Reason.UNKNOWN_POLICY, Code.NOT_FOUND)
    assert await running.client.load_model("other", "two") == (0, "two")


async def test_a_call_that_waits_for_memory_does_not_keep_a_policy(running: Running) -> None:
    """Nobody can resume the memory of a policy that is unloaded."""
    await running.client.load_model("other", "two")
    await running.served.policies.release_memory("other")
    call = asyncio.create_task(running.client.generate(PROMPT, PLAIN, CallOptions(policy="other")))
    await until(lambda: running.served.policies.get("other").newest.calls == 1)
    await running.client.unload_model("other")
    error = await refused(call, Reason.UNKNOWN_POLICY, Code.NOT_FOUND)
    assert "unloaded while its memory was released" in error.message
    assert running.opened["two"].closed and not running.opened["two"].asks


async def test_an_update_under_way_ends_before_its_policy_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": np.zeros(3, np.float32)}, path)
    canary = (CanaryProbe((1, 2, 3), (-1.0, -1.0)),)
    weights = PublishedWeights(1, WeightsKind.FULL, path.as_uri(), sha256(path), "two", canary)
    async with started(weights_folder=tmp_path) as running:
        await running.client.load_model("other", "two")
        backend = running.opened["two"]
        backend.judge.clear()
        updating = asyncio.create_task(running.client.update_weights(weights, "other"))
        await until(lambda: backend.policy_version == 1)
        unloading = asyncio.create_task(running.client.unload_model("other"))
        await until(lambda: "other" not in [deployment.name for deployment in running.served.policies.deployments])
        backend.judge.set()
        assert await updating == 0.0
        await unloading
        assert backend.closed


async def test_a_policy_is_loaded_again_when_it_is_unloaded(tmp_path: Path) -> None:
    """Not before: two of one name would have one folder."""
    async with started(state_folder=tmp_path) as running:
        await running.client.load_model("other", "two")
        backend = running.opened["two"]
        backend.go_on.clear()
        call = asyncio.create_task(running.client.generate(PROMPT, PLAIN, CallOptions(policy="other")))
        await until(lambda: len(backend.asks) == 1)
        unloading = asyncio.create_task(running.client.unload_model("other"))
        await until(lambda: "other" not in [deployment.name for deployment in running.served.policies.deployments])
        loading = asyncio.create_task(running.client.load_model("other", "three"))
        await running.client.load_model("new", "four")
        assert not loading.done() and "three" not in running.opened.asked
        backend.go_on.set()
        assert (await call).token_ids
        await unloading
        assert backend.closed
        assert await loading == (1, "three")


async def test_a_change_that_comes_when_its_policy_is_closed_is_refused(running: Running) -> None:
    await running.client.load_model("other", "two")
    policy = running.served.policies.get("other")
    await running.client.unload_model("other")
    changed: list[object] = []

    async def work(deployment: object) -> None:
        changed.append(deployment)

    await refused(policy.change(work), Reason.UNKNOWN_POLICY, Code.NOT_FOUND)
    assert not changed


async def test_a_policy_whose_record_cannot_be_deleted_stays(tmp_path: Path) -> None:
    async with started(state_folder=tmp_path) as running:
        await running.client.load_model("other", "two")
        record = tmp_path / "policies" / "other" / "model.json"
        record.unlink()
        record.mkdir()
        with pytest.raises(OSError, match=r"model\.json"):
            await running.served.policies.unload_model("other")
        await running.serves("two", 0, "other")
        record.rmdir()
        await running.client.unload_model("other")
        assert running.opened["two"].closed


async def test_a_service_that_stops_while_it_unloads_closes_the_model() -> None:
    opened = Opened()
    async with started(opened) as running:
        await running.client.load_model("other", "two")
        opened["two"].go_on.clear()
        call = asyncio.create_task(running.client.generate(PROMPT, PLAIN, CallOptions(policy="other")))
        await until(lambda: len(opened["two"].asks) == 1)
        unloading = asyncio.create_task(running.served.policies.unload_model("other"))
        await until(lambda: len(list(running.served.policies.deployments)) == 1)
    results = await asyncio.gather(call, unloading, return_exceptions=True)
    assert all(isinstance(result, BaseException) for result in results)
    assert opened["two"].closed


async def test_a_replaced_model_is_closed_also_when_its_policy_is_unloaded_meanwhile(running: Running) -> None:
    await running.client.load_model("other", "two")
    old = running.opened["two"]
    old.may_close.clear()
    await running.client.load_model("other", "three")
    await until(lambda: old.closings == 1)
    unloading = asyncio.create_task(running.client.unload_model("other"))
    await until(lambda: running.opened["three"].closed)
    old.may_close.set()
    await unloading
    assert old.closed


async def test_a_service_that_stops_while_it_closes_a_model_closes_it() -> None:
    opened = Opened()

    async def let_it_close_when_the_service_stops() -> None:
        await until(lambda: opened["two"].closings == 2)
        opened["two"].may_close.set()

    async with started(opened) as running:
        await running.client.load_model("other", "two")
        opened["two"].may_close.clear()
        unloading = asyncio.create_task(running.served.policies.unload_model("other"))
        await until(lambda: opened["two"].closings == 1)
        stopping = asyncio.create_task(let_it_close_when_the_service_stops())
    with pytest.raises(asyncio.CancelledError):
        await unloading
    await stopping
    assert opened["two"].closed


async def test_only_a_policy_that_serves_can_be_unloaded(running: Running) -> None:
    """So a call that is repeated does not unload what another caller loads next."""
    unload = running.client.unload_model
    running.opened.go_on.clear()
    opening = asyncio.create_task(running.client.load_model("other", "two"))
    await until(lambda: "two" in running.opened.asked)
    await refused(unload("other"), Reason.UNKNOWN_POLICY, Code.NOT_FOUND)
    running.opened.go_on.set()
    await opening
    running.opened["two"].may_close.clear()
    closing = asyncio.create_task(unload("other"))
    await until(lambda: running.opened["two"].closings == 1)
    await refused(unload("other"), Reason.UNKNOWN_POLICY, Code.NOT_FOUND)
    running.opened["two"].may_close.set()
    await closing


async def test_the_default_policy_stays(running: Running) -> None:
    await refused(running.client.unload_model("actor"), Reason.DEFAULT_POLICY, Code.FAILED_PRECONDITION)
    await running.serves("one", 0)


async def test_under_load_a_llama_replaces_a_qwen_and_takes_weights(tmp_path: Path) -> None:
    """Real models. No call fails; answers are those of one model each, and afterwards of the trained Llama."""
    qwen = write_tiny_model(tmp_path / "qwen")
    llama = write_llama_model(tmp_path / "llama")
    settings: dict[str, Any] = {"models_folder": tmp_path, "weights_folder": tmp_path, "slots": 32}
    references = {0: load(qwen), 1: load(llama)}
    async with serving(qwen, **settings) as served:
        foreign = full_weights(tmp_path / "w0", references[0].state_dict(), 1, (await served.client.info()).fingerprint)
        stop = asyncio.Event()
        replaced = asyncio.Event()
        # by whether the new model served when the call began
        during: list[Any] = []
        after: list[Any] = []

        async def call() -> None:
            while not stop.is_set():
                answers = after if replaced.is_set() else during
                answers.append(await served.client.generate([5, 6, 7], SamplingParams(max_tokens=4)))

        callers = [asyncio.create_task(call()) for _ in range(8)]
        await until(lambda: len(during) > 20)
        version, fingerprint = await served.client.load_model("actor", str(llama))
        replaced.set()
        await until(lambda: len(after) > 20)
        stop.set()
        await asyncio.gather(*callers)
        assert version == 1
        for answer in during + after:
            [span] = answer.policy_versions
            expected = plain_log_probs(references[span.policy_version], [5, 6, 7, *answer.token_ids])[2:]
            assert answer.log_probs == pytest.approx(expected, abs=1e-4)
        assert {answer.policy_versions[0].policy_version for answer in during} in ({0}, {0, 1})
        assert {answer.policy_versions[0].policy_version for answer in after} == {1}
        with pytest.raises(DomainError) as caught:
            await served.client.update_weights(foreign)
        assert caught.value.reason in (Reason.MODEL_MISMATCH, Reason.VERSION_CONFLICT)
        tensors = {name: tensor * 1.5 for name, tensor in references[1].state_dict().items()}
        await served.client.update_weights(full_weights(tmp_path / "w2", tensors, 2, fingerprint))
        references[1].load_state_dict(tensors)
        answer = await served.client.generate([5, 6, 7], SamplingParams(max_tokens=4))
        expected = plain_log_probs(references[1], [5, 6, 7, *answer.token_ids])[2:]
        assert answer.policy_versions[0].policy_version == 2
        assert answer.log_probs == pytest.approx(expected, abs=1e-4)
