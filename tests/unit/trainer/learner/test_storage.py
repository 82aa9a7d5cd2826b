"""Checkpoints and published weights: bit-equal after a restart, whole or refused, never both old and new."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mulligan.common.errors import DomainError, Reason
from mulligan.common.fingerprint import model_fingerprint
from mulligan.common.inference import PublishedWeights, WeightsKind
from mulligan.trainer.learner.learner import Learner
from mulligan.trainer.learner.settings import LearnerSpec
from mulligan.trainer.learner.weight_check import RANDOM_SEQUENCES
from mulligan.trainer.settings import LoraSettings
from tests.support.learning import FULL, LORA, PLAIN, learn, make, many, sampled, server_settings, spec, weights_digest
from tests.support.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def test_the_same_seed_starts_the_same_adapter_and_another_does_not(tiny: Path, tmp_path: Path) -> None:
    first, again, other = (weights_digest(make(tiny, tmp_path, LORA, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_loading_restores_counters_and_clears_gradients(tiny: Path, tmp_path: Path) -> None:
    learner = make(tiny, tmp_path)
    learn(learner, range(2))
    before = weights_digest(learner)
    learner.save_checkpoint("two", next_call=5)
    learner.forward_backward(many(6), PLAIN)
    state = learner.load_checkpoint("two")
    assert (state.next_sequence, state.optimizer_steps, learner.optimizer_steps) == (5, 2, 2)
    assert learner.optim_step()["skipped"] == 1
    assert weights_digest(learner) == before


def test_saving_again_changes_nothing_and_another_state_replaces(tiny: Path, tmp_path: Path) -> None:
    learner = make(tiny, tmp_path)
    first = learner.save_checkpoint("one")
    files = {path: path.read_bytes() for path in (tmp_path / "checkpoints" / "learner" / "one").iterdir()}
    assert learner.save_checkpoint("one") == first
    assert {path: path.read_bytes() for path in files} == files
    learn(learner, range(1))
    assert learner.save_checkpoint("one").sha256 != first.sha256
    assert len(list((tmp_path / "checkpoints" / "learner" / "one").iterdir())) == len(files)
    after = weights_digest(learner)
    learn(learner, range(1))
    learner.load_checkpoint("one")
    assert weights_digest(learner) == after


def test_a_save_that_dies_leaves_what_was_there(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = make(tiny, tmp_path)
    learner.save_checkpoint("one")
    before = weights_digest(learner)
    learn(learner, range(1))
    replace = Path.replace

    def dies(path: Path, target: Path) -> Path:
        if target.name == "manifest.json":
            raise OSError("no space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", dies)
    with pytest.raises(OSError, match="no space"):
        learner.save_checkpoint("one")
    monkeypatch.undo()
    fresh = make(tiny, tmp_path)
    fresh.load_checkpoint("one")
    assert weights_digest(fresh) == before


def flip_a_bit(folder: Path) -> None:
    path = max(folder.glob("weights-*"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate(folder: Path) -> None:
    path = next(folder.glob("optimizer-*"))
    path.write_bytes(path.read_bytes()[:100])


def lose_a_file(folder: Path) -> None:
    next(folder.glob("random-*")).unlink()


def garble_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def change_a_digit_of_the_manifest(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    assert '"optimizer_steps": 1' in text
    (folder / "manifest.json").write_text(text.replace('"optimizer_steps": 1', '"optimizer_steps": 3'))


def edit_the_manifest(folder: Path, **changes: object) -> None:
    """As a person does, who leaves out the checksum."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["crc32"]
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


def point_outside(folder: Path) -> None:
    files = json.loads((folder / "manifest.json").read_text())["files"]
    files["weights"]["file"] = "../../../weights.safetensors"
    edit_the_manifest(folder, files=files)


def another_format(folder: Path) -> None:
    edit_the_manifest(folder, format=99)


def numbers_as_texts(folder: Path) -> None:
    state = json.loads((folder / "manifest.json").read_text())["state"]
    edit_the_manifest(folder, state=state | {"next_sequence": "1"})


def a_negative_number(folder: Path) -> None:
    state = json.loads((folder / "manifest.json").read_text())["state"]
    edit_the_manifest(folder, state=state | {"optimizer_steps": -1})


def no_table_of_files(folder: Path) -> None:
    edit_the_manifest(folder, files=5)


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        truncate,
        lose_a_file,
        garble_the_manifest,
        change_a_digit_of_the_manifest,
        numbers_as_texts,
        a_negative_number,
        no_table_of_files,
        point_outside,
        another_format,
    ],
)
def test_damage_is_noticed_and_nothing_changes(tiny: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    learner = make(tiny, tmp_path)
    learn(learner, range(1))
    learner.save_checkpoint("one")
    learn(learner, range(1))
    before = weights_digest(learner)
    damage(tmp_path / "checkpoints" / "learner" / "one")
    with pytest.raises(DomainError) as caught:
        learner.load_checkpoint("one")
    assert caught.value.reason is Reason.CHECKPOINT_MISMATCH
    assert (weights_digest(learner), learner.optimizer_steps) == (before, 2)


def test_a_checkpoint_of_an_earlier_release_is_loaded(tiny: Path, tmp_path: Path) -> None:
    learner = make(tiny, tmp_path)
    learner.save_checkpoint("one")
    before = weights_digest(learner)
    edit_the_manifest(tmp_path / "checkpoints" / "learner" / "one")
    learn(learner, range(1))
    learner.load_checkpoint("one")
    assert weights_digest(learner) == before


def test_a_checkpoint_of_another_model_is_refused(tiny: Path, tmp_path: Path) -> None:
    make(tiny, tmp_path).save_checkpoint("one")
    other = write_tiny_model(tmp_path / "deep", layers=3)
    for learner in (make(other, tmp_path), make(tiny, tmp_path, LORA)):
        with pytest.raises(DomainError) as caught:
            learner.load_checkpoint("one")
        assert caught.value.reason is Reason.CHECKPOINT_MISMATCH


def test_an_unknown_checkpoint_is_not_found(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(DomainError) as caught:
        make(tiny, tmp_path).load_checkpoint("never")
    assert caught.value.reason is Reason.CHECKPOINT_NOT_FOUND


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "/a", ".hidden", "-f", "a\x00", "a\n", "x" * 129])
def test_names_stay_inside_the_folder(tiny: Path, tmp_path: Path, name: str) -> None:
    learner = make(tiny, tmp_path)
    for call in (learner.save_checkpoint, learner.load_checkpoint, lambda name: make(tiny, tmp_path, name=name)):
        with pytest.raises(DomainError) as caught:
            call(name)
        assert caught.value.reason is Reason.INVALID_FIELD


def test_old_checkpoints_go_but_never_the_last_two(tiny: Path, tmp_path: Path) -> None:
    learner = make(tiny, tmp_path, keep_checkpoints=1)
    for name in ("a", "b", "c", "d"):
        learner.save_checkpoint(name)
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "learner").iterdir()) == ["c", "d"]


def path_of(weights: PublishedWeights) -> Path:
    return Path(urlparse(weights.uri).path)


def test_published_weights_load_into_a_fresh_model(tiny: Path, tmp_path: Path) -> None:
    learner = make(tiny, tmp_path)
    learn(learner, range(2))
    weights = learner.publish_weights(12)
    path = path_of(weights)
    assert (weights.kind, path.name) == (WeightsKind.FULL, "learner-v000012.safetensors")
    assert weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    fresh = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    assert weights.fingerprint == model_fingerprint(fresh, AutoTokenizer.from_pretrained(tiny))
    published = load_file(path)
    result = fresh.load_state_dict(published, strict=False)
    assert result.missing_keys == ["lm_head.weight"] and result.unexpected_keys == []  # tied: stored once
    assert set(published) == {name for name, _ in fresh.named_parameters()}
    ids = torch.tensor([sampled().token_ids])
    with torch.no_grad():
        assert torch.equal(fresh(input_ids=ids).logits, learner.model.base(input_ids=ids).logits)


def test_a_published_adapter_loads_into_a_fresh_model(tiny: Path, tmp_path: Path) -> None:
    learner = make(tiny, tmp_path, LORA)
    learn(learner, range(2))
    weights = learner.publish_weights(1)
    path = path_of(weights)
    assert weights.kind is WeightsKind.LORA
    assert sorted(file.name for file in path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert weights.sha256 == hashlib.sha256((path / "adapter_model.safetensors").read_bytes()).hexdigest()
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    assert weights.fingerprint == model_fingerprint(base, AutoTokenizer.from_pretrained(tiny))
    fresh = PeftModel.from_pretrained(base, str(path)).eval()
    ids = torch.tensor([sampled().token_ids])
    with torch.no_grad():
        assert torch.equal(fresh(input_ids=ids).logits, learner.model.base(input_ids=ids).logits)


@pytest.mark.parametrize("lora", [FULL, LORA])
def test_publishing_again_is_idempotent_and_old_versions_go(
    tiny: Path, tmp_path: Path, lora: LoraSettings | None
) -> None:
    learner = make(tiny, tmp_path, lora)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "somebody-else").touch()
    found = []
    for version in (1, 2, 3, 4):
        learn(learner, range(version, version + 1))
        found.append(learner.publish_weights(version))
    assert learner.publish_weights(4) == found[-1]
    learner.publish_weights(2)  # after going back to an older checkpoint: the newest publication stays
    names = {path.name.removesuffix(".safetensors") for path in (tmp_path / "weights").iterdir()}
    assert names == {"somebody-else", *(f"learner-v{version:06d}" for version in (2, 3, 4))}


def expected_canary(weights: PublishedWeights, tiny: Path, dtype: torch.dtype) -> list[list[float]]:
    """By transformers' own code, from the published file alone, one sequence at a time."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype)
    if weights.kind is WeightsKind.LORA:
        model = PeftModel.from_pretrained(model, str(path_of(weights)), autocast_adapter_dtype=False).to(dtype)
    else:
        model.load_state_dict(load_file(path_of(weights)), strict=False)
    found = []
    for probe in weights.canary:
        ids = torch.tensor([probe.token_ids])
        with torch.no_grad():
            log_probs = model.eval()(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        found.append(log_probs.gather(1, ids[0, 1:, None])[:, 0].tolist())
    return found


@pytest.mark.parametrize("lora", [FULL, LORA])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.1)])
def test_the_canary_is_of_the_published_weights(
    tiny: Path, tmp_path: Path, lora: LoraSettings | None, dtype: str, tolerance: float
) -> None:
    settings = spec(tiny, lora, learning_rate=0.1)
    settings = replace(settings, model=settings.model.model_copy(update={"dtype": dtype}))
    learner = Learner("learner", settings, server_settings(tmp_path))
    initial = learner.publish_weights(1)
    learn(learner, range(2))
    weights = learner.publish_weights(2)
    assert [len(probe.token_ids) for probe in weights.canary] == [len(probe.log_probs) + 1 for probe in weights.canary]
    expected = expected_canary(weights, tiny, getattr(torch, dtype))
    for probe, log_probs in zip(weights.canary, expected, strict=True):
        assert list(probe.log_probs) == pytest.approx(log_probs, abs=tolerance)
    change = [abs(a - b) for old, new in pairs_of(initial, weights) for a, b in zip(old, new, strict=True)]
    assert max(change) > 10 * tolerance, "what was learned shows"


def pairs_of(one: PublishedWeights, other: PublishedWeights) -> Iterator[tuple[tuple[float, ...], tuple[float, ...]]]:
    for old, new in zip(one.canary, other.canary, strict=True):
        assert old.token_ids == new.token_ids, "the sequences are of the model, whatever it has learned"
        yield old.log_probs, new.log_probs


@pytest.mark.parametrize("lora", [FULL, LORA])
def test_equal_weights_have_the_same_canary(tiny: Path, tmp_path: Path, lora: LoraSettings | None) -> None:
    one = make(tiny, tmp_path, lora)
    learn(one, range(1))
    one.save_checkpoint("one")
    other = make(tiny, tmp_path, lora)
    assert other.publish_weights(1).canary != one.publish_weights(1).canary
    other.load_checkpoint("one")
    assert other.publish_weights(2).canary == one.publish_weights(2).canary


def test_the_canary_stays_inside_vocabulary_and_context(tiny: Path, tmp_path: Path) -> None:
    embedded = Learner("embedded", LearnerSpec(), server_settings(tmp_path))
    for learner in (make(tiny, tmp_path), embedded):
        limits = learner.model.limits
        canary = learner.model.probes()
        assert len(canary) >= RANDOM_SEQUENCES
        for probe in canary:
            assert 2 <= len(probe.token_ids) <= limits.context_length
            assert min(probe.token_ids) >= 0 and max(probe.token_ids) < limits.vocabulary_size
    assert len(embedded.model.probes()) == RANDOM_SEQUENCES + 1, "text, too"
