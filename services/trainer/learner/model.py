"""The model that is trained: loading, LoRA, and log-probabilities of chosen tokens."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import structlog
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.logging import disable_progress_bar

from mulligan import models
from mulligan.common.errors import DomainError, Reason
from mulligan.common.fingerprint import model_fingerprint
from mulligan.common.inference import CanaryProbe
from mulligan.common.model_files import (
    UnsupportedModel,
    check_loaded,
    check_model,
    context_length,
    layer_count,
    short,
)
from mulligan.trainer.data import ModelLimits
from mulligan.trainer.learner import fused_head, sharding, tree_attention, weight_check
from mulligan.trainer.learner.batching import ModelInput, Sequences
from mulligan.trainer.learner.ranks import Ranks
from mulligan.trainer.learner.settings import LOGITS_AT_ONCE, Attention
from mulligan.trainer.learner.tensor_files import TensorStream
from mulligan.trainer.loss_terms import KlReference
from mulligan.trainer.settings import TrainedModelSettings

log = structlog.get_logger()
T = TypeVar("T")


class PolicyModel:
    """A causal language model in training, on one device.

    The module stays in evaluation mode. There is no dropout, so `Forward` and `ForwardBackward` give the same
    probabilities. `dtype` is that of the computation (autocast) and of published weights. Trained parameters are always
    float32, because small updates vanish in bfloat16; weights that LoRA does not train are in `dtype`.

    The reference model has the same dtypes, so the KL is exactly 0 while the weights are unchanged.
    """

    def __init__(
        self,
        settings: TrainedModelSettings,
        device: torch.device,
        seed: int,
        ranks: Ranks | None = None,
        *,
        gradient_checkpointing: bool = False,
        attention: Attention = "auto",
    ):
        self.settings = settings
        self.device = device
        self._ranks = ranks or Ranks()
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self._reference: Any = None
        self._kept = torch.float32 if settings.lora is None else self.dtype
        base, tokenizer = self._ranks.together(partial(load_source, settings, self._kept))
        self.fingerprint = model_fingerprint(base, tokenizer)
        self.limits = ModelLimits(
            base.get_input_embeddings().num_embeddings, context_length(base.config.get_text_config())
        )
        self._probe_sequences = _probe_sequences(tokenizer, self.limits, settings.source)
        self.parameter_count: int = sum(parameter.numel() for parameter in base.parameters())
        _check_head(base, settings.source)
        self.base = sharding.moved(base.eval(), device, self._ranks)
        self._tree_kernel = self._share_prefixes(attention)
        self.shares_prefixes = self._tree_kernel is not None
        self.adapter: Any = None
        self.adapted_layers: tuple[str, ...] = ()
        if settings.lora is not None:
            from mulligan.trainer.learner import lora

            self.adapter = lora.attach(self.base, settings.lora, seed).eval()
            self.adapted_layers = lora.kinds(self.adapter)
        if gradient_checkpointing:
            with self._autocast():
                _checkpoint_layers(self.base, settings.source)
        self._weight_names = _distinct_names(self.base)
        sharding.share_out(self.base, self._ranks)
        self.trainable: dict[str, torch.nn.Parameter] = {
            name: parameter for name, parameter in self._module().named_parameters() if parameter.requires_grad
        }
        self.moving_reference: dict[str, Tensor] = {}  # of the trained weights; empty until it is first used

    def _share_prefixes(self, attention: Attention) -> tree_attention.Kernel | None:
        """By which attention the model computes what sequences share at their begin once. If by none, the log says
        why."""
        kernels: list[tree_attention.Kernel] = ["flex", "sdpa"] if self.device.type == "cuda" else ["sdpa"]
        kind = self.base.config.model_type
        reason = ""
        for kernel in kernels if attention == "auto" else [attention]:
            try:
                with self._autocast():
                    tree_attention.enable(self.base, kernel)
            except tree_attention.NoSharing as error:
                reason = str(error)
            else:
                if reason:
                    log.warning("shared prefixes are computed without FlexAttention", architecture=kind, reason=reason)
                return kernel
        log.warning("shared prefixes are computed for each sequence", architecture=kind, reason=reason)
        return None

    def _module(self) -> Any:
        return self.base if self.adapter is None else self.adapter

    def whole_pass(self, work: Callable[[], T]) -> T:
        """Runs `work`. Within it the methods that run the model may be called; from a tensor that it returns, a
        backward pass may follow."""
        return sharding.whole_pass(self.base, work)

    def hidden(self, given: ModelInput) -> Tensor:
        """What the output head predicts the next token from, _PH: of all tokens of the input, row after row."""
        return self._hidden(self.base, given)

    def score(
        self, hidden_NH: Tensor, sequences: Sequences, *, entropy_gradient: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the trained tokens, and entropies of their distributions, both _N.

        The distribution is softmax(logits / temperature). The entropy has a gradient only if asked for, as that costs
        memory.
        """
        return self._score(self.base, hidden_NH, sequences, entropy_gradient)

    def reference_hidden(self, given: ModelInput, reference: KlReference) -> Tensor:
        """As `hidden`, under the initial weights or the moving reference, without gradient.

        The initial weights of a model with LoRA are those without the adapter. Otherwise a second, frozen model is
        loaded from the source at first use.
        """
        with torch.no_grad(), self._as_reference(reference) as model:
            return self._run(model, partial(self._hidden, model, given))

    def reference_log_probs(self, hidden_NH: Tensor, sequences: Sequences, reference: KlReference) -> Tensor:
        """The log-probabilities of the trained tokens, from hidden states of the reference."""
        with torch.no_grad(), self._as_reference(reference) as model:
            return self._run(model, partial(self._score, model, hidden_NH, sequences, False))[0]

    def _run(self, model: Any, work: Callable[[], T]) -> T:
        """A whole pass of the model; the base is within one already."""
        return work() if model is self.base else sharding.whole_pass(model, work)

    @contextlib.contextmanager
    def _as_reference(self, reference: KlReference) -> Iterator[Any]:
        if reference is KlReference.MOVING:
            with self._exchanged(self.moving_reference):
                yield self.base
        elif self.adapter is not None:
            with self.adapter.disable_adapter():
                yield self.base
        else:
            if self._reference is None:
                initial, _ = self._ranks.together(partial(load_source, self.settings, self._kept))
                self._reference = sharding.moved(initial.eval().requires_grad_(False), self.device, self._ranks)
                if self._tree_kernel is not None:
                    tree_attention.enable(self._reference, self._tree_kernel)
                sharding.share_out(self._reference, self._ranks)
            yield self._reference

    def move_reference(self) -> None:
        """Makes the present weights the moving reference."""
        self.moving_reference = {name: parameter.detach().clone() for name, parameter in self.trainable.items()}

    @contextlib.contextmanager
    def _exchanged(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """The model has these trained weights within the block. Backward passes of earlier forward passes must wait
        until it has ended."""
        if self._ranks.size > 1:
            own = {name: parameter.detach().clone() for name, parameter in self.trainable.items()}
            sharding.refill(self.base, self.trainable, weights)
            yield  # not undone after an error: the learner is deleted then
            sharding.refill(self.base, self.trainable, own)
            return
        own = {name: parameter.data for name, parameter in self.trainable.items()}
        try:
            for name, parameter in self.trainable.items():
                parameter.data = weights[name]
            yield
        finally:
            for name, parameter in self.trainable.items():
                parameter.data = own[name]

    def compare(
        self,
        hidden_NH: Tensor,
        other_NH: Tensor,
        own: Sequences,
        function: Callable[..., Tensor],
        *values_N: Tensor,
    ) -> Tensor:
        """`function(own_PV, other_PV, *values_P)` of the distributions over the vocabulary at the trained tokens, from
        the hidden states of the sequences and of others, in pieces of bounded size. The others have no gradient."""
        with self._autocast():
            return _compare(self.base, hidden_NH, other_NH, own.temperatures_N, function, values_N)

    def _autocast(self) -> AbstractContextManager[Any]:
        # A pass uses each weight once. A cache would hold a copy of all weights, also of those of other processes.
        return torch.autocast(
            self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False
        )

    def _hidden(self, model: Any, given: ModelInput) -> Tensor:
        """The only forward pass through the layers."""
        more = {} if given.tree is None else {"position_ids": given.positions_RT, "prefix_tree": given.tree}
        with self._autocast():
            output = model.base_model(input_ids=given.token_ids_RT, use_cache=False, **more)
            hidden_PH: Tensor = output.last_hidden_state.flatten(0, 1)
            return hidden_PH

    def _score(
        self, model: Any, hidden_NH: Tensor, sequences: Sequences, entropy_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        with self._autocast():
            return _score(model, hidden_NH, sequences.targets_N, sequences.temperatures_N, entropy_gradient)

    def probes(self) -> tuple[CanaryProbe, ...]:
        """The probes of the weight check, under the present weights. With several processes, their forward pass
        rounds the weights as published, but computes norms and softmax in float32 (autocast)."""
        if self._ranks.size == 1:
            return weight_check.probes(self.base, self._probe_sequences, self.dtype)
        rounded = {
            name: parameter.detach().to(self.dtype).to(parameter.dtype) for name, parameter in self.trainable.items()
        }

        def logits(ids_BT: Tensor) -> Tensor:
            hidden_BTH = self.base.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
            return _logits(self.base.get_output_embeddings(), _cap(self.base), hidden_BTH)

        def work() -> tuple[CanaryProbe, ...]:
            with self._exchanged(rounded), self._autocast():
                return weight_check.probes_of(logits, self._probe_sequences, self.device)

        return self.whole_pass(work)

    def full_weights(self) -> TensorStream:
        """All weights by their names in `state_dict()`, tied ones once, in the model's dtype."""
        state = self.base.state_dict()
        return TensorStream({name: state[name] for name in self._weight_names}, self.dtype)

    def trained_weights(self) -> TensorStream:
        return TensorStream(self.trainable)

    def adapter_weights(self) -> dict[str, Tensor]:
        """Whole, on the CPU."""
        return dict(self.trained_weights())

    def save_adapter(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """Writes adapter_config.json and adapter_model.safetensors, as peft and inference engines read them."""
        assert self.adapter is not None
        self.adapter.save_pretrained(str(folder), save_embedding_layers=False, state_dict=weights)


def _distinct_names(model: Any) -> list[str]:
    """The names in `state_dict()`, of tied weights the first."""
    names: dict[tuple[int, tuple[int, ...]], str] = {}
    for name, tensor in model.state_dict().items():
        names.setdefault((tensor.data_ptr(), tuple(tensor.shape)), name)
    return list(names.values())


def load_source(settings: TrainedModelSettings, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model and tokenizer. Raises DomainError MODEL_NOT_FOUND, or UNSUPPORTED_MODEL, which says which file is wrong."""
    disable_progress_bar()  # it would fill the log
    source = settings.source
    try:
        path = models.locate(source, settings.revision)
        check_model(path)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=True,  # a pickle can run code
        )
        model, info = loaded
        check_loaded(path, info, layer_count(model.config.get_text_config()))
        return model, AutoTokenizer.from_pretrained(path, use_fast=True)
    except UnsupportedModel as error:
        raise _unsupported(str(error), source) from error
    except Exception as error:  # loaders raise many kinds of errors
        raise _unsupported(f"{source} cannot be loaded: {short(error)}", source) from error


def _checkpoint_layers(model: Any, source: str) -> None:
    """Has the layers keep their inputs alone for the backward pass. transformers does so in training mode only; that is
    set for the layers and not for the modules in them, whose dropout stays off.

    Raises DomainError UNSUPPORTED_MODEL for models without such layers, and layers that have dropout themselves.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers or not model.supports_gradient_checkpointing:
        raise _unsupported(f"{model.config.model_type} has no gradient checkpointing", source)
    model.activation_checkpointing_enable({"use_reentrant": False})
    ids_BT = torch.arange(4, device=model.device)[None]
    with torch.no_grad():
        expected = model(input_ids=ids_BT, use_cache=False).logits
        for layer in layers:
            layer.training = True
        if not torch.equal(model(input_ids=ids_BT, use_cache=False).logits, expected):
            raise _unsupported(f"{model.config.model_type}: its layers compute something else in training mode", source)


def _unsupported(message: str, source: str) -> DomainError:
    there = source in models.EMBEDDED_MODELS or os.path.exists(source)
    reason = Reason.UNSUPPORTED_MODEL if there else Reason.MODEL_NOT_FOUND
    return DomainError(reason, f"model.source: {message}", field="model.source", source=source)


def _probe_sequences(tokenizer: Any, limits: ModelLimits, source: str) -> weight_check.ProbeTokens:
    """Raises DomainError UNSUPPORTED_MODEL for a tokenizer that does not work."""
    try:
        return weight_check.probe_sequences(tokenizer, limits)
    except Exception as error:
        raise _unsupported(f"the tokenizer of {source} encodes nothing: {short(error)}", source) from error


def _score(
    model: Any, hidden_NH: Tensor, targets_N: Tensor, temperatures_N: Tensor, entropy_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Applies the output head to the trained positions, fused or in pieces of bounded size."""
    head = model.get_output_embeddings()
    cap = _cap(model)
    if fused_head.usable(head, cap, hidden_NH.device):
        log_probs_N, entropy_N = fused_head.score(
            hidden_NH.bfloat16(), head.weight.bfloat16(), targets_N, temperatures_N
        )
        return log_probs_N, entropy_N if entropy_gradient else entropy_N.detach()

    def piece(hidden_NH: Tensor, targets_N: Tensor, temperatures_N: Tensor) -> tuple[Tensor, Tensor]:
        logits_NV = _logits(head, cap, hidden_NH) / temperatures_N[:, None]
        log_probs_NV = logits_NV.log_softmax(-1)
        with contextlib.nullcontext() if entropy_gradient else torch.no_grad():
            entropy_N = -(log_probs_NV.exp() * log_probs_NV).sum(-1)
        return log_probs_NV.gather(-1, targets_N[:, None])[:, 0], entropy_N

    results = _in_pieces(piece, _vocabulary(head), hidden_NH, targets_N, temperatures_N)
    return torch.cat([result[0] for result in results]), torch.cat([result[1] for result in results])


def _compare(
    model: Any,
    hidden_NH: Tensor,
    other_NH: Tensor,
    temperatures_N: Tensor,
    function: Callable[..., Tensor],
    values_N: Sequence[Tensor],
) -> Tensor:
    head = model.get_output_embeddings()
    cap = _cap(model)

    def piece(hidden_PH: Tensor, other_PH: Tensor, temperatures_P: Tensor, *values_P: Tensor) -> Tensor:
        with torch.no_grad():
            other_PV = (_logits(head, cap, other_PH) / temperatures_P[:, None]).log_softmax(-1)
        own_PV = (_logits(head, cap, hidden_PH) / temperatures_P[:, None]).log_softmax(-1)
        return function(own_PV, other_PV, *values_P)

    return torch.cat(_in_pieces(piece, 2 * _vocabulary(head), hidden_NH, other_NH, temperatures_N, *values_N))


def _cap(model: Any) -> float | None:
    cap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return cap


def _vocabulary(head: Any) -> int:
    return int(head.weight.shape[0])


def _in_pieces(piece: Callable[..., Any], floats: int, *tensors_N: Tensor) -> list[Any]:
    """The results of `piece`, which computes so many floats for each token. The backward pass computes each again."""
    size = max(1, LOGITS_AT_ONCE // floats)
    if len(tensors_N[0]) <= size:
        return [piece(*tensors_N)]
    parts = zip(*(tensor_N.split(size) for tensor_N in tensors_N), strict=True)
    return [checkpoint(piece, *part, use_reentrant=False) for part in parts]


def _logits(head: Any, cap: float | None, hidden_NH: Tensor) -> Tensor:
    logits_NV: Tensor = head(hidden_NH)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return logits_NV if cap is None else torch.tanh(logits_NV / cap) * cap


def _check_head(model: Any, source: str) -> None:
    """Raises DomainError UNSUPPORTED_MODEL if the model's logits differ from those of `_logits`."""
    ids_BT = torch.arange(4)[None]
    with torch.no_grad():
        expected = model(input_ids=ids_BT, use_cache=False).logits
        hidden_BTH = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
        actual = _logits(model.get_output_embeddings(), _cap(model), hidden_BTH)
    if not torch.allclose(expected.float(), actual, rtol=1e-2, atol=1e-3):
        raise _unsupported(f"{model.config.model_type}: this kind of output head is unsupported", source)


@contextlib.contextmanager
def arithmetic(*, deterministic: bool, threads: int) -> Iterator[None]:
    """Sets torch's global mode for the block. Learners of one process must run one at a time."""
    was = torch.are_deterministic_algorithms_enabled()
    threads_before = torch.get_num_threads()
    torch.use_deterministic_algorithms(deterministic)
    if deterministic or threads:
        torch.set_num_threads(1 if deterministic else threads)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was)
        torch.set_num_threads(threads_before)
