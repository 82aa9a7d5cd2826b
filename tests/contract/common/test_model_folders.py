"""Folders that are no model, or a damaged one: which file is wrong, and how, say LoadModel, the start of a policy, the
SGLang backend and CreateLearner; and what served before serves on."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # its documented place
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mulligan import models
from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import SamplingParams
from mulligan.common.model_files import UnsupportedModel, check_model, is_hub_id
from mulligan.common.server import RequestInterceptor
from mulligan.common.status import from_rpc_error
from mulligan.env.files import matching
from mulligan.models import EMBEDDED
from mulligan.policy.backends._servers.skeleton import Skeleton
from mulligan.policy.backends.transformers import backend as transformers_backend
from mulligan.policy.config import PolicySettings
from mulligan.policy.policies import Policies
from mulligan.trainer.learner.servicer import LearnerServicer
from mulligan.trainer.v1 import learner_service_pb2 as pb
from mulligan.trainer.v1 import learner_service_pb2_grpc as pb_grpc
from tests.support.learning import server_settings
from tests.support.policy import serving

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 269060552\n"
INDEX = "model.safetensors.index.json"
Damage = Callable[[Path], Any]


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def edit(path: Path, **changes: Any) -> None:
    """Of a JSON file; None removes a key."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[:9], names[9:]), start=1):
        save_file({name: tensors[name] for name in part}, folder / f"model-{number}.safetensors", {"format": "pt"})
    places = {name: f"model-{1 + (index >= 9)}.safetensors" for index, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def without_weight_map(folder: Path) -> None:
    shard(folder)
    edit(folder / INDEX, weight_map=None)


def without_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-2.safetensors").unlink()


def with_cut_shard(folder: Path) -> None:
    shard(folder)
    truncate(folder / "model-2.safetensors", 9000)


def with_tensor_elsewhere(folder: Path) -> None:
    shard(folder)
    edit(
        folder / INDEX, weight_map=json.loads((folder / INDEX).read_text())["weight_map"] | {"x": "model-1.safetensors"}
    )


def only_adapter(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "owner/base"}')
    save_file({}, folder / "adapter_model.safetensors")


def no_files(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def smaller(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:48].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def tokenizer_without_words(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"] |= {"vocab": {}, "merges": []}
    edit(folder / "tokenizer.json", **tokenizer)


def pickled(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_text("{}")

    return damage


# What is done to the embedded model's folder, and the words that the message has to have.
FILES: dict[str, tuple[Damage, list[str]]] = {
    "pointer for weights": (
        lambda folder: (folder / "model.safetensors").write_text(POINTER),
        ["model.safetensors is a git-LFS pointer", "269,060,552", "git lfs pull"],
    ),
    "pointer for a tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text(POINTER),
        ["tokenizer.json is a git-LFS pointer"],
    ),
    "pointer for a template": (
        lambda folder: (folder / "chat_template.jinja").write_text(POINTER),
        ["chat_template.jinja is a git-LFS pointer"],
    ),
    "cut in the tensors": (
        lambda folder: truncate(folder / "model.safetensors", 100_000),
        ["model.safetensors is cut off: 100000 bytes"],
    ),
    "cut in the header": (
        lambda folder: truncate(folder / "model.safetensors", 500),
        ["model.safetensors is cut off: 500 bytes"],
    ),
    "nothing of the weights": (
        lambda folder: truncate(folder / "model.safetensors", 0),
        ["model.safetensors is not a safetensors file"],
    ),
    "a page of the hub for weights": (
        lambda folder: (folder / "model.safetensors").write_text("<!DOCTYPE html><html>" * 9),
        ["model.safetensors is not a safetensors file"],
    ),
    "pickled": (pickled("pytorch_model.bin"), ["pytorch_model.bin", "can run code", "expected model.safetensors"]),
    "pickled in shards": (pickled("pytorch_model.bin.index.json"), ["pytorch_model.bin.index.json", "can run code"]),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ["no weights", "model.safetensors"]),
    "a shard is missing": (without_shard, ["model-2.safetensors is missing", INDEX]),
    "a shard is cut": (with_cut_shard, ["model-2.safetensors is cut off"]),
    "a shard lacks a tensor": (with_tensor_elsewhere, ["model-1.safetensors lacks x"]),
    "an index that is none": (
        without_weight_map,
        [f"{INDEX} has no weight_map"],
    ),
    "a tensor of another size": (smaller, ["model.norm.weight has shape [48]", "[96]", "config.json"]),
    "a configuration of another size": (
        lambda folder: edit(folder / "config.json", vocab_size=256),
        ["has shape [319, 96], but config.json implies [256, 96]"],
    ),
    "a configuration of fewer layers": (
        lambda folder: edit(folder / "config.json", num_hidden_layers=2, layer_types=["full_attention"] * 2),
        ["model.layers.2.", "config.json has 2 layers"],
    ),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), ["config.json is missing"]),
    "a configuration without a type": (
        lambda folder: edit(folder / "config.json", model_type=None),
        ["config.json has no model_type"],
    ),
    "a configuration of an unknown type": (
        lambda folder: edit(folder / "config.json", model_type="nobody-knows"),
        ["nobody-knows"],
    ),
    "a configuration with a word for a number": (
        lambda folder: edit(folder / "config.json", hidden_size="wide"),
        ["hidden_size"],
    ),
    **{
        f"{name} that is no JSON": (
            lambda folder, name=name: (folder / name).write_text('{"a": '),  # type: ignore[misc]
            [f"{name} cannot be read as JSON"],
        )
        for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    },
    "a configuration that is a list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        ["config.json is not a JSON object"],
    ),
    "an end of turn that is no token": (
        lambda folder: edit(folder / "generation_config.json", eos_token_id="</s>"),
        ["generation_config.json: eos_token_id", "expected a token id"],
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), ["no tokenizer", "tokenizer.json"]),
    "an adapter": (only_adapter, ["adapter_config.json", "an adapter, not a model", "owner/base"]),
    "no files": (no_files, ["the folder is empty"]),
}
# What only a policy needs, and finds when it loads the tokenizer.
POLICY_ALONE: dict[str, tuple[Damage, list[str]]] = {
    "a tokenizer without words": (tokenizer_without_words, ["without a vocabulary"]),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Below the folder from which models may be loaded."""
    return Path(shutil.copytree(EMBEDDED, tmp_path / "models" / "mine"))


async def test_a_policy_says_which_file_is_wrong_and_serves_on(folder: Path) -> None:
    async with serving(models_folder=folder.parent) as served:
        for name, (damage, words) in (FILES | POLICY_ALONE).items():
            path = Path(shutil.copytree(EMBEDDED, folder.parent / name))
            damage(path)
            with pytest.raises(DomainError) as caught:
                await served.client.load_model("actor", str(path))
            assert caught.value.reason is Reason.UNSUPPORTED_MODEL, f"{name}: {caught.value}"
            missing = [word for word in words if word not in caught.value.message]
            assert not missing, f"{name}: {missing} is not in {caught.value.message!r}"
        with pytest.raises(DomainError) as caught:
            await served.client.load_model("actor", str(folder.parent / "nowhere"))
        assert caught.value.reason is Reason.UNSUPPORTED_MODEL and "there is no such folder" in caught.value.message
        assert (await served.client.generate([10, 11], SamplingParams(max_tokens=2))).token_ids
        await served.client.load_model("actor", str(folder))


async def test_a_policy_does_not_start_on_such_a_folder(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ExceptionGroup, match=r"actor: .*/mine: no tokenizer: expected tokenizer\.json"):
        await Policies.open(PolicySettings(model=str(folder)))
    with pytest.raises(ExceptionGroup, match=r"actor: .*nowhere: there is no such folder"):
        await Policies.open(PolicySettings(model=str(folder / "nowhere")))


async def test_whatever_a_library_raises_is_told_by_its_type_and_nothing_stops(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What it says is for the server's log alone."""
    async with serving(models_folder=folder.parent) as served:
        monkeypatch.setattr(transformers_backend, "_Loaded", lambda settings: 1 / 0)
        with pytest.raises(DomainError, match="mine cannot be opened: ZeroDivisionError, incident ") as caught:
            await served.client.load_model("actor", str(folder))
        found = re.search("incident ([0-9a-f]{8}): the server's log has it", caught.value.message)
        logged = capfd.readouterr().out
        assert found and found[1] in logged and "division by zero" in logged
        assert "division by zero" not in caught.value.message
        assert caught.value.reason is Reason.UNSUPPORTED_MODEL
        assert (await served.client.generate([10, 11], SamplingParams(max_tokens=2))).token_ids


async def test_a_trainer_says_which_file_is_wrong(tmp_path: Path) -> None:
    servicer = LearnerServicer(server_settings(tmp_path))
    server = grpc.aio.server(interceptors=[RequestInterceptor()])
    pb_grpc.add_LearnerServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = pb_grpc.LearnerServiceStub(channel)
            for name, (damage, words) in FILES.items():
                path = Path(shutil.copytree(EMBEDDED, tmp_path / name))
                damage(path)
                model = pb.ModelConfig(source=str(path))
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.CreateLearner(pb.CreateLearnerRequest(learner_id="a", owner="run", model=model))
                error = from_rpc_error(caught.value)
                assert isinstance(error, DomainError) and error.reason is Reason.UNSUPPORTED_MODEL, f"{name}: {error}"
                assert error.metadata["source"] == str(path) and error.metadata["field"] == "model.source"
                missing = [word for word in words if word not in error.message]
                assert not missing, f"{name}: {missing} is not in {error.message!r}"
    finally:
        await server.stop(None)
        await servicer.close()


@pytest.mark.parametrize("name", [*FILES, *POLICY_ALONE])
def test_sglang_is_not_asked_to_serve_such_a_folder(name: str, folder: Path) -> None:
    damage, words = (FILES | POLICY_ALONE)[name]
    damage(folder)
    with pytest.raises(UnsupportedModel) as caught:
        Skeleton(str(folder))
    assert all(word in str(caught.value) for word in words), str(caught.value)


@given(st.text("aB0_-./", min_size=1, max_size=12) | st.text("a-./", min_size=90, max_size=110))
@example("a" * 97)
@example(f"{'a' * 97}/b")
@example("owner/name.git")
def test_what_the_hub_refuses_is_no_hub_id(source: str) -> None:
    if is_hub_id(source):
        validate_repo_id(source)


@pytest.mark.parametrize("source", ["owner/name", "name", "a", "a/b", "Qwen/Qwen3-4B", "o_1/n-1.5_x", "a" * 96])
def test_hub_ids(source: str) -> None:
    assert is_hub_id(source)


@pytest.mark.parametrize("source", ["x" * 300, f"owner/{'x' * 300}", "x" * 5000, f"/{'x' * 300}", "x\0y", "\udcff"])
def test_a_name_that_no_file_can_have_is_no_folder(source: str, tmp_path: Path) -> None:
    assert "embedded" not in models.locate(source)
    assert is_hub_id(source) or models.problem_of_place(source, tmp_path)
    assert not matching(source)
    with pytest.raises(UnsupportedModel):
        Skeleton(source)


def test_servers_elsewhere_have_the_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_text(POINTER)
    assert Skeleton(str(folder), weights=False).vocabulary_size > 0
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedModel, match="no tokenizer"):
        Skeleton(str(folder), weights=False)


def test_whole_models_pass_in_every_form(folder: Path) -> None:
    for source in ("owner/name", str(EMBEDDED), str(folder)):
        check_model(source)
    (folder / "README.md").write_text(POINTER)
    (folder / "pytorch_model.bin").write_text(POINTER)  # not what is loaded
    check_model(str(folder))
    (folder / "pytorch_model.bin").unlink()
    shard(folder)
    check_model(str(folder))
    assert Skeleton(str(folder)).vocabulary_size > 0
