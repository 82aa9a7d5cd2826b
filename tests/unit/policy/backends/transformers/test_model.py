"""Which models the transformers backend computes exactly, and which it refuses to load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mulligan.common.devices import TorchDevices
from mulligan.common.errors import DomainError
from mulligan.common.inference import SamplingParams, WeightsKind
from mulligan.common.model_files import UnsupportedModel
from mulligan.models.build import build_tokenizer
from mulligan.policy.backend import WeightsFile
from mulligan.policy.backends.transformers.attention import SlotAttention, SlotCache
from mulligan.policy.backends.transformers.decoder import Decoder
from mulligan.policy.backends.transformers.model import Model
from mulligan.policy.backends.transformers.runner import Request, Runner
from mulligan.policy.backends.transformers.weights import Weights
from mulligan.policy.config import PolicySettings
from mulligan.testing.weights import load, plain_log_probs
from tests.support.effort import examples

SMALL: dict[str, Any] = {
    "vocab_size": 319,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
SUPPORTED: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**SMALL),
    "tied, with biases": lambda: hf.Qwen2Config(**SMALL, tie_word_embeddings=True),
    "biases everywhere": lambda: hf.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "normed queries and keys": lambda: hf.Qwen3Config(**SMALL, head_dim=12),
    "one head of keys each, longer positions": lambda: hf.Qwen3Config(
        **(SMALL | {"num_key_value_heads": 4}),
        head_dim=8,
        hidden_act="gelu",
        rope_parameters={"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
    ),
    "sliding window": lambda: hf.MistralConfig(**SMALL, sliding_window=8),
    "some layers slide": lambda: hf.Gemma3TextConfig(
        **SMALL, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "experts": lambda: hf.Qwen3MoeConfig(
        **(SMALL | {"head_dim": 8}), num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "learned positions": lambda: hf.GPT2Config(
        vocab_size=319, n_positions=256, n_embd=32, n_layer=3, n_head=4, eos_token_id=1, bos_token_id=1
    ),
}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "softcap": (lambda: hf.Gemma2Config(**SMALL, head_dim=8), "softcap"),
    "recurrent": (
        lambda: hf.MambaConfig(vocab_size=319, hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=4),
        "linear_attention",
    ),
    "chunked": (lambda: hf.Qwen3Config(**SMALL, layer_types=["chunked_attention"] * 3), "chunked_attention"),
    "positions in the attention": (
        lambda: hf.BloomConfig(
            **dict[str, Any](vocab_size=319, hidden_size=32, n_layer=2, n_head=4, max_position_embeddings=64)
        ),
        "no attention of their own",
    ),
}


def saved(folder: Path, config: Any) -> Path:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():  # biases begin as 0 and norms as 1, which would hide their use
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def settings(path: Path) -> PolicySettings:
    return PolicySettings.model_validate({"model": str(path), "device": "cpu", "context_length": 200})


def runner_of(model: Model, *, reuse_prefixes: bool = True, slots: int = 4, room: int | None = None) -> Runner:
    cache = SlotCache(model.layers, slots, model.context_length, torch.float32, model.device, room)
    return Runner(model.forward, cache, model.device, [1], str, reuse_prefixes=reuse_prefixes, tokens_per_pass=24)


@pytest.mark.parametrize("name", list(SUPPORTED))
def test_passes_over_slots_give_the_log_probs_of_the_models_own_code(name: str, tmp_path: Path) -> None:
    """Sequences far longer than the windows, prompts in several passes, and prefixes taken over from other slots."""
    path = saved(tmp_path, SUPPORTED[name]())
    model = Model(settings(path))
    reference = load(path)
    runner = runner_of(model)
    rng = np.random.default_rng(0)
    shared = rng.integers(5, 319, 30).tolist()
    finished: list[tuple[Request, Any]] = []
    for number in range(9):
        prompt = [*shared, *rng.integers(5, 319, 1 + 4 * number).tolist()]
        asked = Request(prompt, SamplingParams(max_tokens=3 + 5 * (number % 3)), seed=number)
        while not runner.has_room(asked):
            finished += runner.step()
        runner.admit(asked)
        finished += runner.step()
    while runner.running:
        finished += runner.step()
    assert len(finished) == 9
    for request, sampled in finished:
        tokens = [*request.prompt, *sampled.token_ids]
        expected = plain_log_probs(reference, tokens)
        assert sampled.log_probs == pytest.approx(expected[len(request.prompt) - 1 :], abs=1e-4)
        [[scored]] = list(model.score([tokens], 1.0))
        assert scored == pytest.approx(expected, abs=1e-4)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Any]:
    """A model, and the same by transformers alone."""
    path = saved(tmp_path_factory.mktemp("small"), SUPPORTED["llama"]())
    return Model(settings(path)), load(path)


@hypothesis.settings(max_examples=examples(20))
@given(
    asked=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 150), st.integers(1, 60)), min_size=1, max_size=14),
    room=st.sampled_from([200, 230, 500]),
)
def test_what_slots_hold_together_is_bounded_and_changes_no_answer(
    small: tuple[Model, Any], asked: list[tuple[int, int, int]], room: int
) -> None:
    """Prompts of three conversations, of all lengths, in 12 slots of 200 tokens each."""
    model, reference = small
    runner = runner_of(model, slots=12, room=room)
    rng = np.random.default_rng(0)
    texts = [rng.integers(5, 319, 160).tolist() for _ in range(3)]
    finished: list[tuple[Request, Any]] = []
    for number, (which, length, most) in enumerate(asked):
        one = Request(texts[which][:length], SamplingParams(max_tokens=most), seed=number)
        while not runner.has_room(one):
            assert runner.running, "with nothing else there is room"
            finished += runner.step()
        runner.admit(one)
        assert runner._held.sum() <= room and (runner._cached <= runner._held).all()
        finished += runner.step()
    while runner.running:
        finished += runner.step()
    assert len(finished) == len(asked)
    for request, sampled in finished:
        tokens = [*request.prompt, *sampled.token_ids]
        expected = plain_log_probs(reference, tokens)[len(request.prompt) - 1 :]
        assert sampled.log_probs == pytest.approx(expected, abs=1e-4)


WRITTEN_OUT = {
    "llama",
    "tied, with biases",
    "sliding window",
    "normed queries and keys",
    "one head of keys each, longer positions",
}


@pytest.mark.parametrize("name", list(SUPPORTED))
def test_the_common_decoders_are_written_out(name: str, tmp_path: Path) -> None:
    model = Model(settings(saved(tmp_path, SUPPORTED[name]())))
    assert Decoder.can_run(model.module) == (name in WRITTEN_OUT)


@pytest.mark.parametrize("name", sorted(WRITTEN_OUT))
def test_new_weights_count_in_passes_as_in_scores(name: str, tmp_path: Path) -> None:
    model = Model(settings(saved(tmp_path, SUPPORTED[name]())))
    weights = Weights(model.module, model.load_weights)
    runner = runner_of(model)
    prompt = list(range(20, 60))

    def sampled() -> tuple[float, ...]:
        """The log-probabilities of a completion by passes, which are those of scoring it."""
        runner.flush()
        runner.admit(Request(prompt, SamplingParams(max_tokens=4), seed=0))
        while not (done := runner.step()):
            pass
        [(_, found)] = done
        assert not isinstance(found, DomainError)
        [[scored]] = list(model.score([[*prompt, *found.token_ids]], 1.0))
        assert found.log_probs == pytest.approx(scored[len(prompt) - 1 :], abs=1e-4)
        return found.log_probs

    before = sampled()
    changed = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in model.module.named_parameters()}
    weights.apply(changed, WeightsKind.FULL)
    assert sampled() != pytest.approx(before, abs=1e-2)


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_would_be_computed_wrongly_is_not_loaded(name: str, tmp_path: Path) -> None:
    make, words = REFUSED[name]
    path = saved(tmp_path, make())
    with pytest.raises(UnsupportedModel, match=words):
        Model(settings(path))


def test_a_model_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match="/nowhere/at/all"):
        Model(settings(Path("/nowhere/at/all")))


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("tpu", "device: no such device 'tpu': expected cpu, cuda or cuda:NUMBER; did you mean 'cpu'?"),
        ("cuda", "device: 'cuda' needs a GPU, and torch 2.9 was built without CUDA: install a build of torch for CUDA"),
    ],
)
def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, device: str, said: str) -> None:
    monkeypatch.setattr(TorchDevices, "seen_by", lambda module: TorchDevices("2.9", False, 0))
    with pytest.raises(UnsupportedModel) as caught:
        Model(PolicySettings.model_validate({"model": "embedded", "device": device}))
    assert str(caught.value).startswith(said)


def test_tied_weights_are_in_a_file_once_under_either_name(tmp_path: Path) -> None:
    model = Model(settings(saved(tmp_path / "model", SUPPORTED["tied, with biases"]())))
    weights = Weights(model.module, model.load_weights)
    tensors = {name: torch.randn_like(tensor) for name, tensor in model.module.state_dict().items()}
    embedding = tensors.pop("model.embed_tokens.weight")
    head = tensors.pop("lm_head.weight")

    def file(number: int, **named: torch.Tensor) -> WeightsFile:
        save_file(tensors | {name.replace("__", "."): tensor for name, tensor in named.items()}, tmp_path / str(number))
        return WeightsFile(tmp_path / str(number), WeightsKind.FULL, number, "")

    for number, named in enumerate(({"model__embed_tokens__weight": embedding}, {"lm_head__weight": head})):
        weights.apply(weights.read(file(number, **named)), WeightsKind.FULL)
        assert torch.equal(model.module.lm_head.weight, next(iter(named.values())))
        assert model.module.lm_head.weight is model.module.model.embed_tokens.weight
    with pytest.raises(DomainError, match="twice"):
        weights.read(file(3, model__embed_tokens__weight=embedding, lm_head__weight=head))


def test_only_new_tokens_of_a_conversation_are_computed(tmp_path: Path) -> None:
    """In its own slot where it goes on; copied where another begins alike, which leaves the first one whole."""
    model = Model(settings(saved(tmp_path, SUPPORTED["llama"]())))
    computed: list[int] = []

    def forward(ids: torch.Tensor, positions: torch.Tensor, last: torch.Tensor, attend: SlotAttention) -> torch.Tensor:
        computed.append(len(ids))
        return model.forward(ids, positions, last, attend)

    cache = SlotCache(model.layers, 3, model.context_length, torch.float32, model.device)
    runner = Runner(forward, cache, model.device, [1], str, reuse_prefixes=True, tokens_per_pass=4096)

    def run(prompt: list[int]) -> list[int]:
        computed.clear()
        runner.admit(Request(prompt, SamplingParams(max_tokens=2, temperature=0.0), seed=0))
        while not (done := runner.step()):
            pass
        [(_, sampled)] = done
        assert not isinstance(sampled, DomainError)
        return [*prompt, *sampled.token_ids]

    system = list(range(10, 50))
    first = run([*system, 60, 61])
    assert computed == [42, 1]
    second = run([*system, 70])
    assert computed == [1, 1]  # the system prompt was copied
    run([*first, 80, 81])
    assert computed == [3, 1]  # the last sampled token was never computed
    run([*second, 82])
    assert computed == [2, 1]
    runner.flush()
    run([*second, 82])
    assert computed[0] == len(second) + 1


def test_a_model_without_some_of_its_weights_is_refused(tmp_path: Path) -> None:
    """transformers would fill them with random numbers."""
    path = saved(tmp_path, SUPPORTED["llama"]())
    file = path / "model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "layers.1.mlp.up" not in name}, file)
    with pytest.raises(UnsupportedModel, match=r"lacks 1 of its weights, first model\.layers\.1\.mlp\.up_proj\.weight"):
        Model(settings(path))
