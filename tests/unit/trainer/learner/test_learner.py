"""The learner in process: gradients, optimizer steps, bad data, and what micro-batches must not change."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from mulligan.common.errors import DomainError, Reason
from mulligan.trainer.data import Datum
from mulligan.trainer.learner import learner as learner_module
from mulligan.trainer.learner import model as model_module
from mulligan.trainer.learner.batching import length
from mulligan.trainer.learner.learner import Learner
from mulligan.trainer.learner.local import LocalLearner
from mulligan.trainer.learner.metrics import merge
from mulligan.trainer.losses import ppo
from mulligan.trainer.objective import Loss
from mulligan.trainer.settings import LoraSettings, OptimizerSettings, TrainedModelSettings
from tests.support.learning import FULL, LORA, PLAIN, distilled, many, sampled, server_settings, spec
from tests.support.tiny_model import CONTEXT_LENGTH, VOCABULARY_SIZE, write_tiny_model

ALL_TERMS = ppo.Settings(kl_coefficient=0.1, entropy_coefficient=0.01)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def make(tiny: Path, folder: Path, lora: LoraSettings | None = None, **server: object) -> Learner:
    return Learner("learner", spec(tiny, lora), server_settings(folder, **server))


def gradients(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in learner.model.trainable.items() if parameter.grad is not None}


def reference_log_probs(tiny: Path, datum: Datum) -> list[float]:
    """One sequence at a time, through the model's own forward."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([datum.token_ids])).logits[0] / datum.temperature
    table = logits.log_softmax(-1)
    return [table[i - 1, datum.token_ids[i]].item() for i, trained in enumerate(datum.loss_mask) if trained]


@pytest.mark.parametrize("lora", [FULL, LORA])
def test_forward_is_the_model_itself(tiny: Path, tmp_path: Path, lora: LoraSettings | None) -> None:
    data = many(12)
    for datum, found in zip(data, make(tiny, tmp_path, lora).forward(data), strict=True):
        assert list(found) == pytest.approx(reference_log_probs(tiny, datum), abs=1e-5)


def test_large_vocabularies_are_scored_in_pieces(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make(tiny, tmp_path)
    pieces = make(tiny, tmp_path)
    expected = whole.forward_backward(many(12), ALL_TERMS)
    monkeypatch.setattr(model_module, "LOGITS_AT_ONCE", 5 * VOCABULARY_SIZE)
    assert pieces.forward_backward(many(12), ALL_TERMS) == pytest.approx(expected, abs=1e-5)
    for name, gradient in gradients(pieces).items():
        assert torch.allclose(gradient, gradients(whole)[name], atol=1e-6)


@pytest.mark.parametrize("lora", [FULL, LORA])
def test_the_gradient_does_not_depend_on_micro_batches_or_calls(
    tiny: Path, tmp_path: Path, lora: LoraSettings | None
) -> None:
    data = many(20)
    whole, split, calls = (make(tiny, tmp_path, lora, microbatch_tokens=tokens) for tokens in (10_000, 50, 100))
    expected = whole.forward_backward(data, ALL_TERMS)
    found = split.forward_backward(data, ALL_TERMS)
    merged = merge([calls.forward_backward(data[:7], ALL_TERMS), calls.forward_backward(data[7:], ALL_TERMS)])
    fewest = expected.pop("computed_tokens")
    for metrics in (found, merged):
        assert metrics.pop("computed_tokens") >= fewest  # a prefix that two micro-batches share is computed twice
        assert metrics == pytest.approx(expected, abs=1e-5)
    assert gradients(whole)
    for name, gradient in gradients(whole).items():
        assert torch.allclose(gradients(split)[name], gradient, atol=1e-6)
        assert torch.allclose(gradients(calls)[name], gradient, atol=1e-6)


@pytest.mark.parametrize("sharing", [True, False])
def test_how_far_a_call_is_can_be_read_meanwhile(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharing: bool
) -> None:
    """Also of data that only run forward, which come last."""
    learner = make(tiny, tmp_path, microbatch_tokens=50)
    monkeypatch.setattr(learner.model, "shares_prefixes", sharing)
    seen: list[tuple[int, int]] = []
    inner = learner.model.whole_pass

    def observed(run: Callable[[], torch.Tensor]) -> torch.Tensor:
        seen.append(learner.progress)
        return inner(run)

    monkeypatch.setattr(learner.model, "whole_pass", observed)
    data = [*many(20), *(replace(datum, datum_id=f"still-{datum.datum_id}", weight=0.0) for datum in many(5))]
    total = sum(length(datum) for datum in data)
    for call in (lambda: learner.forward_backward(data, PLAIN), lambda: learner.forward(data)):
        seen.clear()
        call()
        assert {of for _, of in seen} == {total} and learner.progress == (0, 0)
        done = [one for one, _ in seen]
        assert len(done) > 3 and done == sorted(set(done)) and done[0] == 0 < done[-1] < total
    seen.clear()

    def fails(run: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(learner.model, "whole_pass", fails)
    with pytest.raises(RuntimeError):
        learner.forward_backward(data, PLAIN)
    assert learner.progress == (0, 0)


def test_data_that_cannot_move_the_weights_leave_no_gradient(tiny: Path, tmp_path: Path) -> None:
    learner = make(tiny, tmp_path)
    metrics = learner.forward_backward([sampled(advantage=0.0), sampled(weight=0.0)], PLAIN)
    assert gradients(learner) == {} and metrics["first/tokens"] == 4
    assert learner.optim_step()["skipped"] == 1


@pytest.mark.parametrize("lora", [FULL, LORA])
def test_good_tokens_become_likelier_and_bad_ones_rarer(tiny: Path, tmp_path: Path, lora: LoraSettings | None) -> None:
    learner = make(tiny, tmp_path, lora)
    good = sampled("good", (2, 3, 4, 5, 6))
    bad = sampled("bad", (9, 8, 7, 6, 5), advantage=-1.0)
    taught = distilled("taught", (11, 12, 13, 14, 15))
    data = [good, bad, taught]
    before = learner.forward(data)
    for _ in range(3):
        learner.forward_backward(data, PLAIN)
        metrics = learner.optim_step()
        assert metrics["skipped"] == 0 and metrics["grad_norm"] > 0
    change = [sum(after) - sum(old) for after, old in zip(learner.forward(data), before, strict=True)]
    assert change[0] > 0 > change[1] and change[2] > 0
    assert learner.optimizer_steps == 3


@pytest.mark.parametrize("lora", [FULL, LORA])
def test_the_initial_policy_stays_the_reference(tiny: Path, tmp_path: Path, lora: LoraSettings | None) -> None:
    learner = make(tiny, tmp_path, lora)
    loss = ppo.Settings(kl_coefficient=0.1)
    assert learner.forward_backward([sampled()], loss)["first/kl"] == pytest.approx(0.0, abs=1e-9)
    learner.optim_step()
    datum = sampled()
    new = learner.forward([datum])[0]
    old = reference_log_probs(tiny, datum)
    expected = sum(math.expm1(b - a) - (b - a) for a, b in zip(new, old, strict=True)) / 2
    assert learner.forward_backward([datum], loss)["first/kl"] == pytest.approx(expected, rel=1e-3)
    assert "first/kl" not in learner.forward_backward([datum], PLAIN)


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [FULL, LORA])
def test_the_kl_of_unchanged_weights_is_zero_to_the_bit(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lora: LoraSettings | None,
    dtype: Literal["float32", "bfloat16"],
    deterministic: bool,
    pieces: bool,
) -> None:
    """The policy and its reference are computed in the same arithmetic, in every mode."""
    if pieces:
        monkeypatch.setattr(model_module, "LOGITS_AT_ONCE", 5 * VOCABULARY_SIZE)
    settings = replace(spec(tiny), model=TrainedModelSettings(source=str(tiny), lora=lora, dtype=dtype))
    learner = Learner("learner", replace(settings, deterministic=deterministic), server_settings(tmp_path))
    learner.save_checkpoint("start")
    loss = ppo.Settings(kl_coefficient=0.1)
    names = {"first/kl", "reflection/kl"}
    metrics = learner.forward_backward(many(12), loss)
    assert {name: metrics[name] for name in names} == dict.fromkeys(names, 0.0)
    learner.optim_step()
    metrics = learner.forward_backward(many(12), loss)
    assert min(metrics[name] for name in names) > 0
    learner.load_checkpoint("start")
    metrics = learner.forward_backward(many(12), loss)
    assert {name: metrics[name] for name in names} == dict.fromkeys(names, 0.0)


def test_metrics_say_what_was_learned_from(tiny: Path, tmp_path: Path) -> None:
    learner = make(tiny, tmp_path)
    now = learner.forward([sampled()])[0]
    data = [
        sampled(rollout=now, advantage=2.0, weight=0.5),
        sampled(rollout=[value - 5 for value in now], old=[value - 1 for value in now], branch="second"),
        distilled(target_weight=0.25),
    ]
    metrics = learner.forward_backward(data, PLAIN)
    mean = sum(now) / 2
    assert metrics["first/loss"] == pytest.approx(-2.0)  # 0.5 · 2 tokens · −2 · ratio 1
    assert metrics["second/loss"] == pytest.approx(-2 * 2 * 1.28)  # truncated weight 2, clipped ratio 1.28
    assert metrics["distilled/loss"] == pytest.approx(-0.25 * sum(now))
    assert metrics["loss"] == pytest.approx(sum(metrics[f"{b}/loss"] for b in ("first", "second", "distilled")))
    assert (metrics["first/clip_fraction"], metrics["second/clip_fraction"], metrics["clip_fraction"]) == (0, 1, 0.5)
    assert metrics["first/mismatch_kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["second/mismatch_kl"] == pytest.approx(math.exp(4) - 4 - 1, rel=1e-4)
    assert metrics["distilled/log_prob"] == pytest.approx(mean)
    assert (metrics["first/tokens"], metrics["tokens"]) == (2, 6)
    assert 0 < metrics["entropy"] <= math.log(VOCABULARY_SIZE)
    assert "distilled/mismatch_kl" not in metrics


BAD = {
    "data[1].token_ids[2]": [sampled(tokens=(2, 3, VOCABULARY_SIZE, 4, 5)), sampled(tokens=(2, 3, -1, 4, 5))],
    "data[1].token_ids": [sampled(tokens=[2] * (CONTEXT_LENGTH + 1)), replace(sampled(), token_ids=(1,))],
    "data[1].loss_mask": [replace(sampled(), loss_mask=(False, True)), sampled(trained=(), rollout=())],
    "data[1].loss_mask[0]": [sampled(trained=(0, 1))],
    "data[1].weight": [sampled(weight=math.inf)],
    "data[1].temperature": [sampled(temperature=0.0), sampled(temperature=math.nan), sampled(temperature=-1.0)],
    "data[1].policy_gradient.advantage": [sampled(advantage=math.nan)],
    "data[1].policy_gradient.rollout_log_probs": [sampled(rollout=(-1.0,)), sampled(rollout=(-1.0, -math.inf))],
    "data[1].policy_gradient.old_log_probs": [sampled(old=(-1.0,)), sampled(old=(-1.0, math.nan))],
    "data[1].distillation.target_weight": [distilled(target_weight=math.nan)],
    "data[1].branch": [replace(distilled(), branch="first")],
}


@pytest.mark.parametrize(("field", "datum"), [(field, datum) for field, data in BAD.items() for datum in data])
def test_bad_data_are_named_and_change_nothing(
    tiny: Path, tmp_path_factory: pytest.TempPathFactory, field: str, datum: Datum
) -> None:
    learner = make(tiny, tmp_path_factory.getbasetemp())
    bad = replace(datum, datum_id="culprit")
    for call in (lambda: learner.forward([sampled(), bad]), lambda: learner.forward_backward([sampled(), bad], PLAIN)):
        with pytest.raises(DomainError) as caught:
            call()
        assert (caught.value.reason, caught.value.metadata["field"]) == (Reason.INVALID_FIELD, field)
        assert "culprit" in caught.value.message
    assert gradients(learner) == {}


def test_a_gradient_that_is_not_finite_skips_the_step(tiny: Path, tmp_path: Path) -> None:
    learner = make(tiny, tmp_path)
    before = learner.forward([sampled()])
    learner.forward_backward([sampled(weight=1e300)], PLAIN)
    metrics = learner.optim_step()
    assert metrics["skipped"] == metrics["not_finite"] == 1 and not math.isfinite(metrics["grad_norm"])
    assert learner.optim_step() | {"grad_norm": 0} == metrics | {"grad_norm": 0, "not_finite": 0}, "nothing accumulated"
    assert learner.forward([sampled()]) == before and learner.optimizer_steps == 0
    learner.forward_backward([sampled()], PLAIN)
    assert learner.optim_step()["skipped"] == 0  # nothing of the bad gradient is left


def test_too_many_steps_in_a_row_that_are_not_finite_are_refused(tiny: Path, tmp_path: Path) -> None:
    optimizer = OptimizerSettings(learning_rate=1e-2, max_skipped_steps=2)
    learner = Learner("learner", replace(spec(tiny), optimizer=optimizer), server_settings(tmp_path))
    before = learner.forward([sampled()])
    for weight, skipped in ((1e300, 1), (1e300, 1), (1.0, 0), (1e300, 1), (0.0, 1), (1e300, 1)):
        learner.forward_backward([sampled(weight=weight)], PLAIN)
        assert learner.optim_step()["skipped"] == skipped, "a good step ends the row; one without data does not count"
    learner.save_checkpoint("one")
    learner.forward_backward([sampled(weight=1e300)], PLAIN)
    for _ in range(2):
        with pytest.raises(DomainError, match="max_skipped_steps") as caught:
            learner.optim_step()
        assert caught.value.reason is Reason.NOT_FINITE
    assert learner.optimizer_steps == 1 and learner.forward([sampled()]) != before
    learner.load_checkpoint("one")
    learner.forward_backward([sampled()], PLAIN)
    assert learner.optim_step()["skipped"] == 0


def test_a_loss_that_is_not_finite_skips_the_step(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its gradient is finite."""
    learner = make(tiny, tmp_path)
    before = learner.forward([sampled()])
    monkeypatch.setattr(
        learner_module, "loss_of", lambda kind: lambda terms, loss: Loss(-terms.log_probs_N + float("inf"))
    )
    learner.forward_backward([sampled()], PLAIN)
    monkeypatch.undo()
    metrics = learner.optim_step()
    assert metrics["skipped"] == metrics["not_finite"] == 1 and math.isfinite(metrics["grad_norm"])
    assert learner.forward([sampled()]) == before
    learner.forward_backward([sampled()], PLAIN)
    assert learner.optim_step()["skipped"] == 0


def test_the_gradient_is_clipped_to_the_norm(tiny: Path, tmp_path: Path) -> None:
    small = make(tiny, tmp_path)
    large = make(tiny, tmp_path)
    small.forward_backward([sampled(weight=100.0)], PLAIN)
    large.forward_backward([sampled(weight=1000.0)], PLAIN)
    steps = small.optim_step(), large.optim_step()
    assert steps[1]["grad_norm"] == pytest.approx(10 * steps[0]["grad_norm"], rel=1e-4) and steps[0]["grad_norm"] > 1
    assert [step["grad_clipped"] for step in steps] == [1, 1]
    for one, other in zip(small.model.trainable.values(), large.model.trainable.values(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    small.forward_backward([sampled(weight=1e-3)], PLAIN)
    below = small.optim_step()
    assert below["grad_norm"] < 1 and below["grad_clipped"] == 0


@pytest.mark.parametrize("lora", [FULL, LORA])
def test_bfloat16_learns_with_float32_weights(tiny: Path, tmp_path: Path, lora: LoraSettings | None) -> None:
    settings = replace(spec(tiny), model=TrainedModelSettings(source=str(tiny), lora=lora, dtype="bfloat16"))
    learner = Learner("learner", settings, server_settings(tmp_path))
    assert {parameter.dtype for parameter in learner.model.trainable.values()} == {torch.float32}
    before = sum(learner.forward([sampled()])[0])
    assert before == pytest.approx(sum(reference_log_probs(tiny, sampled())), rel=0.05)
    learner.forward_backward([sampled()], ppo.Settings(kl_coefficient=0.01))
    learner.optim_step()
    assert sum(learner.forward([sampled()])[0]) > before


@pytest.mark.parametrize(
    ("model", "reason", "field"),
    [
        (TrainedModelSettings(source="/nowhere"), Reason.MODEL_NOT_FOUND, "model.source"),
        (
            TrainedModelSettings(lora=LoraSettings(rank=2, target_modules=("no_such",))),
            Reason.INVALID_FIELD,
            "model.lora.target_modules",
        ),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused(
    tiny: Path, tmp_path: Path, model: TrainedModelSettings, reason: Reason, field: str | None
) -> None:
    source = str(tiny) if model.source == "embedded" else model.source
    settings = replace(spec(tiny), model=model.model_copy(update={"source": source}))
    with pytest.raises(DomainError) as caught:
        Learner("learner", settings, server_settings(tmp_path))
    assert (caught.value.reason, caught.value.metadata.get("field")) == (reason, field)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (("lm_head",), "lm_head is tied to model.embed_tokens"),
        (("q_proj", "lm_head"), "lm_head is tied to model.embed_tokens"),
        (("embed_tokens",), "model.embed_tokens is tied to lm_head"),
    ],
)
def test_an_adapter_that_no_policy_could_serve_is_refused(
    tiny: Path, tmp_path: Path, targets: tuple[str, ...], words: str
) -> None:
    with pytest.raises(DomainError, match=words) as caught:
        make(tiny, tmp_path, LoraSettings(rank=2, target_modules=targets))
    assert (caught.value.reason, caught.value.metadata["field"]) == (Reason.INVALID_FIELD, "model.lora.target_modules")


def test_layers_that_are_not_linear_have_no_adapter(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=VOCABULARY_SIZE, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(write_tiny_model(tmp_path / "tiny") / name, tmp_path / name)
    with pytest.raises(DomainError, match="c_attn is of the kind Conv1D") as caught:
        make(tmp_path, tmp_path, LORA)
    assert caught.value.metadata["field"] == "model.lora.target_modules"


def test_it_tells_which_layers_have_an_adapter(tiny: Path, tmp_path: Path) -> None:
    linear = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    assert make(tiny, tmp_path, LORA).adapted_layers == linear
    assert make(tiny, tmp_path, LoraSettings(rank=2, target_modules=("v_proj",))).adapted_layers == ("v_proj",)
    assert make(tiny, tmp_path).adapted_layers == ()


def test_missing_weights_are_not_made_up(tiny: Path, tmp_path: Path) -> None:
    deep = write_tiny_model(tmp_path / "deep", layers=3)
    (deep / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes())
    with pytest.raises(DomainError, match="of its weights, first model") as caught:
        make(deep, tmp_path)
    assert caught.value.reason is Reason.UNSUPPORTED_MODEL


async def test_a_learner_in_this_process_is_a_port(tiny: Path, tmp_path: Path) -> None:
    local = await LocalLearner.create("learner", spec(tiny), server_settings(tmp_path))
    before = await local.forward([sampled()])
    await local.save_checkpoint("start")
    assert (await local.forward_backward([sampled()], PLAIN))["tokens"] == 2
    assert (await local.optim_step())["skipped"] == 0
    assert await local.forward([sampled()]) != before
    await local.load_checkpoint("start")
    assert await local.forward([sampled()]) == before
    assert (await local.publish_weights(3)).policy_version == 3
    await local.close()
