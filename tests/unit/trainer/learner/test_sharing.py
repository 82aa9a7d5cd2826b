"""Shared prefixes are computed once: the gradients are those of separate sequences, and the tokens are counted."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from mulligan.trainer.data import Datum, Distillation, PolicyGradient
from mulligan.trainer.learner import prefix_tree, tree_attention
from mulligan.trainer.learner.batching import length, pack
from mulligan.trainer.learner.learner import Learner
from mulligan.trainer.loss_terms import KlReference
from mulligan.trainer.losses import ppo
from mulligan.trainer.objective import Tokens
from mulligan.trainer.objectives.divergence import Divergence
from mulligan.trainer.objectives.preference import Preference
from mulligan.trainer.settings import LoraSettings
from tests.support.effort import examples
from tests.support.learning import FULL, LORA, PLAIN, many, sampled, server_settings, spec
from tests.support.tiny_model import CONTEXT_LENGTH, VOCABULARY_SIZE, write_model, write_tiny_model

ALL_TERMS = ppo.Settings(kl_coefficient=0.1, entropy_coefficient=0.01, kl_reference=KlReference.MOVING)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def norms_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of transformers compute in float32, whatever the model's precision."""

    def forward(self: Qwen3RMSNorm, hidden: Tensor) -> Tensor:
        variance = hidden.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden * torch.rsqrt(variance + self.variance_epsilon))

    monkeypatch.setattr(Qwen3RMSNorm, "forward", forward)


def in_float64(model: Path, folder: Path, lora: LoraSettings | None = None, **server: Any) -> Learner:
    learner = Learner("learner", spec(model, lora), server_settings(folder, **server))
    learner.model.base.double()
    return learner


def alone(learner: Learner) -> Learner:
    """The same, with each sequence in a micro-batch and a row of its own."""
    learner.model.shares_prefixes = False
    learner.server = replace(learner.server, microbatch_tokens=1)
    return learner


def gradients(learner: Learner) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in learner.model.trainable.items() if parameter.grad is not None}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    scale = max((gradient.abs().max().item() for gradient in expected.values()), default=0.0)
    for name, gradient in found.items():
        assert (gradient - expected[name]).abs().max().item() <= relative * scale, name


def family(count: int, seed: int = 0) -> list[Datum]:
    """Data of all branches and temperatures that begin alike, in questions and answers."""
    rng = random.Random(seed)
    stems = [[rng.randrange(VOCABULARY_SIZE) for _ in range(rng.randint(1, 25))] for _ in range(3)]
    stems = [[*stems[0][:cut], *stem] for stem in stems for cut in (0, 5)]
    data = []
    for datum in many(count, seed):
        stem = rng.choice(stems)
        answer = [rng.randrange(3) for _ in range(rng.randint(1, 10))]
        tokens = (*stem, *answer)
        mask = (*[False] * len(stem), *[True] * len(answer))
        objective = datum.objective
        if isinstance(objective, PolicyGradient):
            objective = replace(objective, rollout_log_probs=tuple(-rng.uniform(1, 3) for _ in answer))
        data.append(replace(datum, token_ids=tokens, loss_mask=mask, objective=objective))
    return data


def pairs(count: int) -> list[Datum]:
    """Preferences of one answer to another, to the same question; and answers in two contexts."""
    rng = random.Random(1)
    data: list[Datum] = []
    for index in range(count):
        question = [index % 2, *[rng.randrange(3) for _ in range(12)]]
        answers = [[rng.randrange(4) for _ in range(rng.randint(1, 6))] for _ in range(2)]
        own, other = (Tokens((*question, *answer), (*[False] * 13, *[True] * len(answer))) for answer in answers)
        hint = (*question, 7, 8, 9)
        teacher = Tokens((*hint, *answers[0]), (*[False] * len(hint), *[True] * len(answers[0])))
        objective = Preference(other, 0.3, 0.5) if index % 3 else Divergence(teacher, [0.0, 1.0, 0.5][index % 9 // 3])
        branch = "preferred" if index % 3 else "taught"
        data.append(Datum(f"p{index}", own.token_ids, own.loss_mask, 0.2, 1 + index / 10, objective, branch))
    return data


@pytest.fixture
def flex_has_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU torch refuses a backward pass of FlexAttention, because what it compiles has none. Not compiled, it
    has one."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)


@pytest.mark.usefixtures("flex_has_gradients")
@pytest.mark.parametrize(("attention", "microbatch_tokens"), [("sdpa", 10_000), ("sdpa", 70), ("flex", 10_000)])
@pytest.mark.parametrize("lora", [FULL, LORA])
def test_the_gradient_is_that_of_separate_sequences(
    tiny: Path, tmp_path: Path, lora: LoraSettings | None, attention: str, microbatch_tokens: int
) -> None:
    """All objectives, branches and temperatures in the same trees, with reference and entropy."""
    data = [*family(30), *pairs(12)]
    random.Random(0).shuffle(data)
    shared = in_float64(tiny, tmp_path, lora, microbatch_tokens=microbatch_tokens, attention=attention)
    assert shared.model.shares_prefixes
    separate = alone(in_float64(tiny, tmp_path, lora))
    for learner in (shared, separate):
        learner.forward_backward(data, ALL_TERMS)
        learner.optim_step()  # the model is no longer its reference, nor LoRA's second matrix zero
    for found, expected in zip(shared.forward(data), separate.forward(data), strict=True):
        assert found == pytest.approx(expected, abs=1e-8)
    metrics, expected_metrics = (learner.forward_backward(data, ALL_TERMS) for learner in (shared, separate))
    assert_equal(gradients(shared), gradients(separate))
    assert metrics["computed_tokens"] < 0.6 * metrics["sequence_tokens"]
    assert {**metrics, "computed_tokens": 0} == pytest.approx({**expected_metrics, "computed_tokens": 0}, rel=1e-6)


@settings(max_examples=examples(25), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_so_it_is_for_any_tree(tiny: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Against plain transformers. Few different tokens: sequences are equal, or begin alike or with one another."""
    drawn = data.draw(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=9), min_size=1, max_size=9))
    batch: list[Datum] = []
    for tokens in drawn:
        trained = data.draw(st.sets(st.integers(1, len(tokens) - 1), min_size=1))
        mask = tuple(place in trained for place in range(len(tokens)))
        temperature = data.draw(st.sampled_from([0.5, 1.0]))
        batch.append(Datum("", tuple(tokens), mask, 0.5, temperature, Distillation(1.0), "all"))
    learner = in_float64(tiny, tmp_path_factory.getbasetemp())
    model = learner.model.base
    with counting(learner) as passes:
        metrics = learner.forward_backward(batch, PLAIN)
    found = gradients(learner)
    inputs = {datum.token_ids[: size + 1] for datum in batch for size in range(length(datum))}
    assert sum(passes) == metrics["computed_tokens"] == len(inputs)
    model.zero_grad(set_to_none=True)
    for datum in batch:
        log_probs = (model(input_ids=torch.tensor([datum.token_ids])).logits[0] / datum.temperature).log_softmax(-1)
        places = [place for place, trained in enumerate(datum.loss_mask) if trained]
        (
            -0.5 * log_probs[[place - 1 for place in places], [datum.token_ids[place] for place in places]].sum()
        ).backward()
    assert_equal(found, gradients(learner))


def test_flex_attention_computes_in_the_type_of_the_model(tiny: Path, tmp_path: Path) -> None:
    """In bfloat16, queries and keys come as float32 from their norms, values do not."""
    settings = spec(tiny)
    settings = replace(settings, model=settings.model.model_copy(update={"dtype": "bfloat16"}))
    data = family(10)
    found = []
    for attention in ("sdpa", "flex"):
        learner = Learner("learner", settings, server_settings(tmp_path, attention=attention))
        assert learner.model.shares_prefixes
        found.append([value for log_probs in learner.forward(data) for value in log_probs])
    assert found[0] == pytest.approx(found[1], abs=0.1) and found[0] != found[1]


def test_a_gpu_takes_flex_attention_where_it_works(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And otherwise, as where nothing can be compiled, the CPU's way, which the log says."""
    model = Learner("learner", spec(tiny), server_settings(tmp_path)).model
    monkeypatch.setattr(model, "device", torch.device("cuda"))  # its weights are on the CPU
    assert model._share_prefixes("auto") == "flex" and model._share_prefixes("sdpa") == "sdpa"
    monkeypatch.setattr(tree_attention, "flex_attention", None)
    with capture_logs() as logs:
        assert model._share_prefixes("auto") == "sdpa" and model._share_prefixes("flex") is None
    assert [entry["event"] for entry in logs] == [
        "shared prefixes are computed without FlexAttention",
        "shared prefixes are computed for each sequence",
    ]
    assert all("'NoneType' object is not callable" in entry["reason"] for entry in logs)


def test_one_sequence_is_computed_by_torchs_causal_kernel(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = in_float64(tiny, tmp_path)
    (datum,) = family(1)
    alike = [datum, replace(datum, datum_id="again")]
    expected = alone(in_float64(tiny, tmp_path)).forward(alike)
    monkeypatch.setitem(tree_attention._KERNELS, "sdpa", None)
    for found, own in zip(learner.forward(alike), expected, strict=True):
        assert found == pytest.approx(own, abs=1e-10)
    with pytest.raises(TypeError):
        learner.forward(family(5))


@contextmanager
def counting(learner: Learner) -> Iterator[list[int]]:
    """The tokens of each pass of the model, counted at its embeddings."""
    passes: list[int] = []
    embeddings = learner.model.base.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda module, args, output: passes.append(args[0].numel()))
    try:
        yield passes
    finally:
        hook.remove()


def unique(data: Sequence[Datum], rows: Sequence[int]) -> int:
    return len({data[row].token_ids[: size + 1] for row in rows for size in range(length(data[row]))})


@pytest.mark.parametrize("budget", [40, 100, 10_000])
def test_micro_batches_compute_unique_tokens_within_the_budget(tiny: Path, tmp_path: Path, budget: int) -> None:
    data = family(40)
    groups = pack(data, range(40), budget, sharing=True)
    assert sorted(row for group in groups for row in group) == list(range(40))
    sizes = [unique(data, group) for group in groups]
    assert all(size <= budget or len(group) == 1 for size, group in zip(sizes, groups, strict=True))
    for group, following in pairwise(groups):
        assert unique(data, [*group, following[0]]) > budget, "no group ends too early"
    learner = in_float64(tiny, tmp_path, microbatch_tokens=budget)
    with counting(learner) as passes:
        learner.forward(data)
    assert passes == sizes


def test_siblings_are_packed_together() -> None:
    questions = [[index] * 20 for index in range(6)]
    data = [sampled(f"{index}", (*questions[index % 6], index), (20,), rollout=(-1.0,)) for index in range(24)]
    groups = pack(data, range(24), 45, sharing=True)
    assert [{row % 6 for row in group} for group in groups] == [{0, 1}, {2, 3}, {4, 5}]


def test_the_reference_is_computed_once_for_all_that_share_a_tree(tiny: Path, tmp_path: Path) -> None:
    data = [datum for datum in pairs(6) if isinstance(datum.objective, Preference)]
    learner = in_float64(tiny, tmp_path, LORA)
    with counting(learner) as passes:
        learner.forward_backward(data, PLAIN)
    assert len(passes) == 2 and passes[0] == passes[1], "the policy, and its reference"


def test_what_is_only_compared_with_runs_apart_and_without_gradient(tiny: Path, tmp_path: Path) -> None:
    data = [datum for datum in pairs(6) if isinstance(datum.objective, Divergence)]
    learner = in_float64(tiny, tmp_path)
    states: list[bool] = []
    embeddings = learner.model.base.get_input_embeddings()
    with counting(learner) as passes:
        embeddings.register_forward_hook(lambda module, args, output: states.append(output.requires_grad))
        learner.forward_backward(data, PLAIN)
    assert states == [True, False]
    teachers = [datum.objective.teacher for datum in data if isinstance(datum.objective, Divergence)]
    assert passes[1] == len({one.token_ids[: size + 1] for one in teachers for size in range(length(one))})


def refused(model: Any, folder: Path) -> str:
    """The log's reason why a model's prefixes are not shared. It must compute the right thing without."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(write_tiny_model(folder / "tiny") / name, folder / name)
    with capture_logs() as logs:
        learner = Learner("learner", spec(folder), server_settings(folder))
    assert not learner.model.shares_prefixes
    data = family(10)
    separate = alone(Learner("learner", spec(folder), server_settings(folder)))
    found, expected = (each.forward_backward(data, PLAIN) for each in (learner, separate))
    assert found["computed_tokens"] >= found["sequence_tokens"]
    assert {**found, "computed_tokens": 0} == pytest.approx({**expected, "computed_tokens": 0}, rel=1e-3, abs=1e-4)
    assert_equal(gradients(learner), gradients(separate), 1e-4)
    (entry,) = [entry for entry in logs if entry["event"] == "shared prefixes are computed for each sequence"]
    return f"{entry['architecture']}: {entry['reason']}"


SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": CONTEXT_LENGTH,
}


def windowed(kind: str, window: int) -> Any:
    """A model of random weights whose layers have a window: all of them, or every second one."""
    kinds = ["sliding_attention", "full_attention"]
    more: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "sliding_window": window}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        match kind:
            case "mistral":
                return MistralForCausalLM(MistralConfig(**SHAPE, **more, initializer_range=0.3))
            case "olmo3":
                return Olmo3ForCausalLM(Olmo3Config(**SHAPE, **more, layer_types=kinds, initializer_range=0.3))
            case _:
                config = Gemma3TextConfig(**SHAPE, **more, layer_types=kinds, head_dim=8, initializer_range=0.3)
                return Gemma3ForCausalLM(config)


@pytest.mark.usefixtures("flex_has_gradients")
@pytest.mark.parametrize("attention", ["sdpa", "flex"])
@pytest.mark.parametrize("window", [1, 4, 60])
@pytest.mark.parametrize("kind", ["mistral", "olmo3", "gemma3"])
def test_layers_with_a_window_share_prefixes(tmp_path: Path, kind: str, window: int, attention: str) -> None:
    """Narrower than what is shared, and wider than all. Against transformers' own masks, one sequence at a time. Their
    norms compute in float32."""
    folder = write_model(windowed(kind, window), tmp_path)
    data = [replace(datum, objective=Distillation(1.0), branch="all") for datum in family(20)]
    learner = in_float64(folder, tmp_path, attention=attention)
    assert learner.model.shares_prefixes
    found = learner.forward(data)
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa")
    expected = [own_log_probs(plain, datum) for datum in data]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other.tolist(), abs=1e-4)
    metrics = learner.forward_backward(data, PLAIN)
    assert metrics["computed_tokens"] < 0.8 * metrics["sequence_tokens"]
    for datum, log_probs in zip(data, expected, strict=True):
        (-datum.weight * log_probs.sum()).backward()
    assert_equal(gradients(learner), {name: parameter.grad for name, parameter in plain.named_parameters()}, 1e-4)
    (alike,) = family(1)
    as_tree, as_row = (each.forward([alike])[0] for each in (learner, alone(learner)))
    assert as_tree == pytest.approx(own_log_probs(plain, alike).tolist(), abs=1e-4)
    assert as_row == pytest.approx(as_tree, abs=1e-8)


def own_log_probs(model: Any, datum: Datum) -> Tensor:
    """Of the trained tokens, by transformers alone."""
    logits = model(input_ids=torch.tensor([datum.token_ids]), use_cache=False).logits[0] / datum.temperature
    places = [place for place, trained in enumerate(datum.loss_mask) if trained]
    found: Tensor = logits.log_softmax(-1)[
        [place - 1 for place in places], [datum.token_ids[place] for place in places]
    ]
    return found


def test_a_window_that_layers_do_not_tell_is_named() -> None:
    model = windowed("olmo3", 4)
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None  # as a model whose masks alone have the window
    with pytest.raises(tree_attention.NoSharing, match="1 of its layers have a window, and 0 say how wide"):
        tree_attention.enable(model, "sdpa")
    assert model.config._attn_implementation == "sdpa"


def test_a_kernel_that_ignores_windows_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sequences by which models are compared are shorter than a window."""
    sdpa = tree_attention._KERNELS["sdpa"]
    monkeypatch.setitem(tree_attention._KERNELS, "sdpa", lambda *given: sdpa(*given[:-1], None))
    with pytest.raises(tree_attention.NoSharing, match="a window hides something else"):
        tree_attention.enable(windowed("mistral", 40), "sdpa")


def test_layers_of_other_kinds_are_named() -> None:
    model = windowed("olmo3", 4)
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(tree_attention.NoSharing, match="it has layers of the kind linear_attention"):
        tree_attention.enable(model, "sdpa")


def test_a_model_that_computes_something_else_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that ignores the positions of the tree, as those whose layers count tokens themselves."""
    config = GPT2Config(vocab_size=VOCABULARY_SIZE, n_positions=CONTEXT_LENGTH, n_embd=16, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config)
    forward = type(model.transformer).forward

    def without_positions(self: Any, *args: Any, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model.transformer), "forward", without_positions)
    assert (
        refused(model, tmp_path) == "gpt2: a tree of short sequences has other hidden states than the sequences alone"
    )


def test_chunks_of_any_size_compute_the_same(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = family(20)
    whole, small = in_float64(tiny, tmp_path), in_float64(tiny, tmp_path)
    whole.forward_backward(data, PLAIN)
    monkeypatch.setattr(prefix_tree, "CHUNK_TOKENS", 6)
    small.forward_backward(data, PLAIN)
    assert_equal(gradients(small), gradients(whole))
