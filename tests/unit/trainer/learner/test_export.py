"""A checkpoint as a folder for transformers and peft: the same probabilities, and nothing half-written."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from mulligan.common import disk
from mulligan.common.errors import DomainError, Reason
from mulligan.common.fingerprint import model_fingerprint
from mulligan.policy.adapter_config import AdapterConfig
from mulligan.testing.weights import load, plain_log_probs
from mulligan.trainer.learner import export as export_module
from mulligan.trainer.learner.export import Exported, ExportRefused, export
from mulligan.trainer.learner.learner import Learner
from mulligan.trainer.learner.settings import LearnerSpec
from mulligan.trainer.settings import LoraSettings, OptimizerSettings, TrainedModelSettings
from tests.support.learning import FULL, LORA, PLAIN, many, sampled, server_settings
from tests.support.tiny_model import write_tiny_model

TOKENS = (2, 3, 4, 5, 6, 7, 8, 9)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    (folder / "LICENSE").write_text("of the model")
    return folder


def trained(
    tiny: Path, folder: Path, lora: LoraSettings | None, dtype: Literal["float32", "bfloat16"] = "float32"
) -> tuple[Learner, Path]:
    """A learner after a few steps, and its checkpoint."""
    settings = TrainedModelSettings(source=str(tiny), lora=lora, dtype=dtype)
    learner = Learner("run-1", LearnerSpec(settings, OptimizerSettings(learning_rate=1e-2)), server_settings(folder))
    for _ in range(4):
        learner.forward_backward(many(8), PLAIN)
        assert learner.optim_step()["skipped"] == 0
    learner.save_checkpoint("run-1-000004")
    return learner, folder / "checkpoints" / "run-1" / "run-1-000004"


def quietly(doing: str, done: int, total: int) -> None:
    """For tests that do not look at the progress."""


def exported(learner: Learner, checkpoint: Path, target: Path, *, merge: bool = False) -> Exported:
    return export(learner.spec.model, checkpoint, target, quietly, merge=merge, record={"run": "run-1"})


def learned(learner: Learner) -> list[float]:
    return list(learner.forward([sampled("whole", TOKENS, range(1, len(TOKENS)))])[0])


@pytest.mark.parametrize(("lora", "merge"), [(FULL, False), (LORA, True)])
def test_transformers_computes_what_was_learned(
    tiny: Path, tmp_path: Path, lora: LoraSettings | None, *, merge: bool
) -> None:
    learner, checkpoint = trained(tiny, tmp_path, lora)
    done = exported(learner, checkpoint, tmp_path / "out" / "model", merge=merge)
    model = load(tmp_path / "out" / "model")
    assert plain_log_probs(model, TOKENS) == pytest.approx(learned(learner), abs=1e-5)
    assert plain_log_probs(load(tiny), TOKENS) != pytest.approx(learned(learner), abs=0.1)
    assert done == Exported(4, sum(parameter.numel() for parameter in model.parameters()), is_adapter=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    # Of the same architecture and tokenizer: weights of the run can be given to it, and it can be trained further.
    assert model_fingerprint(model, tokenizer) == learner.fingerprint
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny).chat_template


def test_peft_computes_what_the_adapter_learned(tiny: Path, tmp_path: Path) -> None:
    learner, checkpoint = trained(tiny, tmp_path, LORA)
    done = exported(learner, checkpoint, tmp_path / "adapter")
    config = AdapterConfig.read(tmp_path / "adapter" / "adapter_config.json")  # policies can serve it
    assert (config.rank, config.content["base_model_name_or_path"]) == (2, str(tiny))
    adapted = PeftModel.from_pretrained(load(tiny), str(tmp_path / "adapter")).eval()
    assert plain_log_probs(adapted, TOKENS) == pytest.approx(learned(learner), abs=1e-5)
    assert done.is_adapter and done.parameters == learner.trainable_parameter_count
    assert not (tmp_path / "adapter" / "model.safetensors").exists()


@pytest.mark.parametrize(("lora", "merge"), [(FULL, False), (LORA, True)])
def test_the_weights_are_those_that_were_published(
    tiny: Path, tmp_path: Path, lora: LoraSettings | None, *, merge: bool
) -> None:
    learner, checkpoint = trained(tiny, tmp_path, lora, "bfloat16")
    exported(learner, checkpoint, tmp_path / "model", merge=merge)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")  # in the type that its configuration names
    assert model.dtype is torch.bfloat16
    if lora is None:
        for name, tensor in learner.model.full_weights():
            assert torch.equal(model.state_dict()[name], tensor), name
    assert plain_log_probs(model.float(), TOKENS) == pytest.approx(learned(learner), abs=0.1)


def test_an_adapter_of_the_hub_names_its_model_and_revision(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, checkpoint = trained(tiny, tmp_path, LORA)
    settings = learner.spec.model.model_copy(update={"source": "some/model", "revision": "v2"})
    monkeypatch.setattr("mulligan.models.locate", lambda source, revision="": str(tiny))
    export(settings, checkpoint, tmp_path / "adapter", quietly)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("some/model", "v2")


def test_the_folder_says_what_it_is_and_is_as_private_as_the_user_wants(tiny: Path, tmp_path: Path) -> None:
    learner, checkpoint = trained(tiny, tmp_path, FULL)
    for umask, mode in ((0o022, 0o644), (0o077, 0o600)):
        target = tmp_path / f"model-{mode:o}"
        before = os.umask(umask)
        try:
            exported(learner, checkpoint, target)
        finally:
            os.umask(before)
        assert {path.stat().st_mode & 0o777 for path in target.iterdir()} == {mode}
        assert target.stat().st_mode & 0o777 == mode | (mode & 0o444) >> 2
    record = json.loads((target / "mulligan.json").read_text())
    assert (record["run"], record["optimizer_steps"], record["model"]["source"]) == ("run-1", 4, str(tiny))
    assert (target / "LICENSE").read_text() == "of the model"


def test_progress_ends_with_all_bytes_and_tells_what_is_done(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, checkpoint = trained(tiny, tmp_path, FULL)
    monkeypatch.setattr(export_module, "_POLL_SECONDS", 0.001)
    seen: list[tuple[str, int, int]] = []
    more = threading.Event()

    def progress(doing: str, done: int, total: int) -> None:
        seen.append((doing, done, total))
        if done:
            more.set()

    save = Qwen3ForCausalLM.save_pretrained

    def slow(self: Any, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        assert more.wait(10)

    monkeypatch.setattr(Qwen3ForCausalLM, "save_pretrained", slow)
    export(learner.spec.model, checkpoint, tmp_path / "model", progress)
    size = 4 * learner.parameter_count
    assert [doing.split()[0] for doing, _, _ in seen if doing.split()[0] != "writing"] == [
        *("comparing", "loading", "moving")
    ]
    assert any(0 < done <= total == size for doing, done, total in seen if doing.startswith("writing"))


class Killed(BaseException):
    """As Ctrl-C."""


def test_an_interrupted_export_leaves_nothing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, checkpoint = trained(tiny, tmp_path, FULL)
    save = Qwen3ForCausalLM.save_pretrained

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Qwen3ForCausalLM, "save_pretrained", interrupted)
        with pytest.raises(Killed):
            exported(learner, checkpoint, tmp_path / "out" / "model")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_a_killed_process_left_goes_with_the_next_export(tiny: Path, tmp_path: Path) -> None:
    learner, checkpoint = trained(tiny, tmp_path, FULL)
    left = tmp_path / "out" / ".exporting-model" / "ready"
    left.mkdir(parents=True)
    (left / "half.safetensors").write_bytes(b"half")
    exported(learner, checkpoint, tmp_path / "out" / "model")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]
    assert not (tmp_path / "out" / "model" / "half.safetensors").exists()


def test_one_process_writes_a_folder_at_a_time(tiny: Path, tmp_path: Path) -> None:
    learner, checkpoint = trained(tiny, tmp_path, FULL)
    refused = []

    def again(doing: str, done: int, total: int) -> None:
        if doing.startswith("loading"):
            with pytest.raises(ExportRefused, match="another process exports to"):
                exported(learner, checkpoint, tmp_path / "model")
            refused.append(doing)

    export(learner.spec.model, checkpoint, tmp_path / "model", again)
    assert refused and load(tmp_path / "model")


@pytest.mark.parametrize("kind", ["file", "folder", "below a file"])
def test_what_is_there_stays(tiny: Path, tmp_path: Path, kind: str) -> None:
    learner, checkpoint = trained(tiny, tmp_path, FULL)
    mine = tmp_path / "mine"
    if kind == "folder":
        mine.mkdir()
        (mine / "notes").write_text("mine")
    else:
        mine.write_text("mine")
    with pytest.raises(ExportRefused, match="mine"):
        exported(learner, checkpoint, mine / "model" if kind == "below a file" else mine)
    assert (mine / "notes" if kind == "folder" else mine).read_text() == "mine"


def test_another_model_other_layers_and_damage_are_refused(tiny: Path, tmp_path: Path) -> None:
    learner, checkpoint = trained(tiny, tmp_path, FULL)
    other = write_tiny_model(tmp_path / "other", layers=3)
    given = learner.spec.model
    for settings, said in (
        (given.model_copy(update={"source": str(other)}), f"it is of another model than {other}"),
        (given.model_copy(update={"lora": LORA}), "other parameters were trained"),
    ):
        with pytest.raises(DomainError, match=said) as refused:
            export(settings, checkpoint, tmp_path / "model", quietly)
        assert refused.value.reason is Reason.CHECKPOINT_MISMATCH
    (weights,) = checkpoint.glob("weights-*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(DomainError, match="is not what was saved"):
        exported(learner, checkpoint, tmp_path / "model")
    assert not (tmp_path / "model").exists() and not (tmp_path / ".exporting-model").exists()


def test_weights_that_are_not_finite_are_refused(tiny: Path, tmp_path: Path) -> None:
    learner, _ = trained(tiny, tmp_path, FULL)
    name, parameter = next(iter(learner.model.trainable.items()))
    with torch.no_grad():
        parameter[0, 0] = float("nan")
    learner.save_checkpoint("broken")
    with pytest.raises(DomainError, match=f"{name} has values that are not finite"):
        exported(learner, tmp_path / "checkpoints" / "run-1" / "broken", tmp_path / "model")


def test_a_full_disk_is_seen_before_anything_is_written(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, checkpoint = trained(tiny, tmp_path, FULL)
    for module in (disk, export_module):
        monkeypatch.setattr(module, "free_bytes", lambda folder: 100)
    monkeypatch.setattr(export_module, "_save", lambda *_, **__: pytest.fail("written"))
    with pytest.raises(DomainError) as refused:
        exported(learner, checkpoint, tmp_path / "model")
    assert refused.value.reason is Reason.DISK_FULL and not (tmp_path / "model").exists()
