"""The memory of a learner's process: what it keeps, and the most that a micro-batch adds.

The formulas count the tensors that the learner's code creates, byte by byte. Tests compare them with those of real
learners. Not counted: what the sharing of prefixes adds (masks, and keys that several branches read), fragmentation,
and what CUDA and NCCL take for themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from mulligan.common.errors import invalid_field
from mulligan.common.suggest import did_you_mean
from mulligan.trainer.estimate.shapes import ModelShape
from mulligan.trainer.learner.settings import LOGITS_AT_ONCE
from mulligan.trainer.loss_terms import KlReference
from mulligan.trainer.settings import RunSettings

_FLOAT32 = 4  # bytes
_EIGHT_BITS = 1 + _FLOAT32 / 256  # a code, and a scale for 256 of them
_WIDE_NORMS = {"olmo2", "olmo3"}  # they multiply with their weights in float32, others after rounding
_GATHERED_LAYERS = 2  # FSDP gathers the next layer while one computes


class Reference(StrEnum):
    """What the KL divergence is to, beside the trained weights."""

    NONE = "none"  # no KL, or the model without its adapter
    TRAINED = "trained"  # a copy of the trained weights
    MODEL = "model"  # a second model


@dataclass(frozen=True, slots=True)
class Training:
    """What the settings of a run say of the memory and the work of training."""

    rank: int = 0  # of LoRA; 0: all weights are trained
    adapted: tuple[str, ...] = ()  # names of the linear maps that have an adapter (`ModelShape.modules`); empty: all
    number: int = 2  # bytes of a number of the computation: 2 in bfloat16, 4 in float32
    has_kl: bool = False
    reference: Reference = Reference.NONE
    entropy_gradient: bool = False
    moment: float = _FLOAT32  # bytes of each of the two moments of a trained weight

    @classmethod
    def of(cls, settings: RunSettings, shape: ModelShape) -> Self:
        """Raises DomainError INVALID_FIELD for adapters of layers that the model does not have."""
        lora = settings.model.lora
        has_kl = settings.loss.kl_coefficient > 0
        reference = Reference.NONE
        if has_kl and settings.loss.kl_reference is KlReference.MOVING:
            reference = Reference.TRAINED
        elif has_kl and lora is None:
            reference = Reference.MODEL
        return cls(
            rank=lora.rank if lora else 0,
            adapted=_adapted(lora.target_modules, shape) if lora else (),
            number=2 if settings.model.dtype == "bfloat16" else _FLOAT32,
            has_kl=has_kl,
            reference=reference,
            entropy_gradient=settings.loss.entropy_coefficient > 0,
            # Half of an adapter has rows that are too short for 8 bits; it is small, and counted as float32.
            moment=_EIGHT_BITS if settings.optimizer.moments == "8bit" and lora is None else _FLOAT32,
        )

    @property
    def frozen(self) -> int:
        """Bytes of a weight of the model: trained ones are float32, those beside an adapter are as computed."""
        return self.number if self.rank else _FLOAT32

    def adapter_parameters(self, shape: ModelShape) -> int:
        """0 without LoRA. An adapter of rank r has r × (inputs + outputs) of each linear map."""
        modules = shape.modules
        return self.rank * sum(sum(modules[name]) for name in self.adapted or modules)

    def trained_parameters(self, shape: ModelShape) -> int:
        return self.adapter_parameters(shape) if self.rank else shape.parameters

    def checkpoint_bytes(self, shape: ModelShape) -> float:
        """Of a checkpoint after an optimizer step, but for names and counters: weights, moments, moving reference."""
        kept_again = _FLOAT32 if self.reference is Reference.TRAINED else 0
        return (_FLOAT32 + 2 * self.moment + kept_again) * self.trained_parameters(shape)

    def published_bytes(self, shape: ModelShape) -> int:
        """Of the weights that the policy is given after a step."""
        return (_FLOAT32 if self.rank else self.number) * self.trained_parameters(shape)


def _adapted(targets: Sequence[str], shape: ModelShape) -> tuple[str, ...]:
    """The names of the maps that these targets name, as peft finds them: each once, whole or from a dot on. Raises
    DomainError INVALID_FIELD for a target that names none."""
    modules = shape.modules
    for target in targets:
        if not any(_names(target, module) for module in modules):
            expected = f"linear layers of {shape.architecture}: {', '.join(shape.linears)}"
            near = did_you_mean(target, [*shape.linears, *modules])
            raise invalid_field("model.lora.target_modules", f"{expected}; got {target!r}{near}")
    return tuple(module for module in modules if any(_names(target, module) for target in targets))


def _names(target: str, module: str) -> bool:
    return module == target or module.endswith(f".{target}")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device. The first five are there all the time; of `head`, `layer` and `embedding`, the parts of a
    micro-batch, one at a time."""

    weights: float  # with full training these are the float32 masters
    gradients: float
    moments: float  # of Adam
    reference: float
    gathered: float  # of other processes' shares: layers at work, and their gradients
    activations: float  # kept from the forward pass for the backward pass
    copies: float  # of float32 weights in the type of the computation, kept likewise
    head: float  # logits and loss of a piece of the trained tokens, or before it a layer of the KL's reference
    layer: float  # the backward pass of a layer
    embedding: float  # gradients of embedding and head, after the activations are freed

    @property
    def kept(self) -> float:
        return self.weights + self.gradients + self.moments + self.reference

    @property
    def total(self) -> float:
        """The peak."""
        during = self.activations + self.copies + max(self.head, self.layer)
        return self.kept + self.gathered + max(during, self.embedding)


def memory(
    shape: ModelShape,
    training: Training,
    tokens: int,
    *,
    gpus: int = 1,
    checkpointing: bool = False,
    on_gpu: bool = True,
) -> Memory:
    """The memory of one of `gpus` processes whose micro-batch computes `tokens` tokens, all of them trained, as one
    sequence. `checkpointing`: the backward pass computes the activations of each layer again."""
    parameters = shape.parameters
    adapters = training.adapter_parameters(shape)
    trained = training.trained_parameters(shape)
    weights = training.frozen * parameters + _FLOAT32 * adapters
    kept_again = {Reference.NONE: 0, Reference.TRAINED: trained, Reference.MODEL: parameters}[training.reference]
    hidden = training.frozen * shape.hidden * tokens
    saved = tokens * saved_per_token(shape, training, on_gpu=on_gpu)
    masks = _masks(shape, training, tokens, checkpointing)
    last = 24.0 * shape.hidden * tokens + (hidden if training.has_kl else 0)  # of the last norm and the head's input
    copies = 0.0
    if not checkpointing and training.number < _FLOAT32:
        copies = training.number * (adapters or shape.layers * shape.layer_matrices)
    return Memory(
        weights=weights / gpus,
        gradients=_FLOAT32 * trained / gpus,
        moments=2 * training.moment * trained / gpus,
        reference=_FLOAT32 * kept_again / gpus,
        gathered=_gathered(shape, training) if gpus > 1 else 0,
        activations=shape.layers * (hidden if checkpointing else saved) + masks,
        copies=copies,
        head=max(_head(shape, training, tokens), _compared(shape, training, tokens)) + last,
        layer=_layer(shape, training, tokens, saved if checkpointing else 0),
        embedding=0 if training.rank else _FLOAT32 * shape.head_parameters * (2 if shape.tied else 1),
    )


def saved_per_token(shape: ModelShape, training: Training, *, on_gpu: bool) -> float:
    """Bytes that a layer keeps of each token for its backward pass.

    Linear maps keep their input if their weights are trained; under autocast each has a copy of its own of a float32
    input. Beside an adapter norms give bfloat16, so maps that have the same input keep one. Norms keep their input in
    float32, and if trained, their normalized input. Attention keeps queries, keys, values, and its result; on a GPU,
    keys and values are repeated for all heads (`tree_attention`).
    """
    number = training.number
    lora = training.rank > 0
    copies = 5 if number < _FLOAT32 and not lora else 2  # of the inputs of q, k, v, gate, up
    norms = 2 * (_FLOAT32 if lora else 2 * _FLOAT32)
    hidden = norms + copies * number
    mlp = 4 * number  # gate, its activation, up, and the input of down
    multiplied = _FLOAT32 if shape.architecture in _WIDE_NORMS else number  # what a trained norm keeps
    normalized = 0 if not shape.query_norms else _FLOAT32 + (0 if lora else multiplied)
    queries = normalized + 2 * number  # rotated; the result, which is the input of the output map
    keys = normalized + 2 * number
    if on_gpu and shape.heads != shape.key_value_heads:
        queries, keys = queries + 2 * number, normalized
    statistics = _FLOAT32 * (2 + shape.heads)  # of the norms; the attention's sums
    if shape.query_norms:
        statistics += _FLOAT32 * (shape.heads + shape.key_value_heads)
    ranks = number * training.rank * len(training.adapted or shape.modules) / shape.layers if lora else 0
    return (
        hidden * shape.hidden
        + mlp * shape.intermediate
        + queries * shape.queries
        + keys * shape.keys
        + statistics
        + ranks
    )


def _masks(shape: ModelShape, training: Training, tokens: int, checkpointing: bool) -> float:
    """Of layers with a window: a mask of all pairs of tokens, which each layer keeps once more, as numbers."""
    windowed = sum(0 < window < tokens for window in shape.windows)
    if not windowed:
        return 0
    return tokens**2 * (1.0 + (0 if checkpointing else training.number * windowed))


def _head(shape: ModelShape, training: Training, tokens: int) -> float:
    """Four float32 values for each token of a piece and each id: logits, log-probabilities, probabilities, and their
    product; two more where the entropy has a gradient. If the head is trained, its gradient is summed over pieces, and
    autocast copies its weights."""
    piece = min(tokens, max(1, LOGITS_AT_ONCE // shape.vocabulary))
    values = 6 if training.entropy_gradient else 4
    copied = training.number if training.number < _FLOAT32 else 0
    weights = 0 if training.rank else (_FLOAT32 + copied) * shape.head_parameters
    return float(values * _FLOAT32 * piece * shape.vocabulary + weights)


def _compared(shape: ModelShape, training: Training, tokens: int) -> float:
    """A layer of the reference model, which keeps nothing: its MLP has three tensors at a time."""
    return float(training.has_kl * tokens * (3 * training.number * shape.intermediate + 12 * shape.hidden))


def _layer(shape: ModelShape, training: Training, tokens: int, saved: float) -> float:
    """`saved` is what the layer keeps once it is computed again."""
    number = training.number
    rounded = number < _FLOAT32
    flowing = tokens * ((2 * number + (2 if rounded else 0)) * shape.intermediate + 10 * shape.hidden)
    if saved and any(0 < window < tokens for window in shape.windows):
        saved += float(number * tokens**2)  # the mask
    if training.rank:
        return saved + flowing
    largest = max(inputs * outputs for inputs, outputs in shape.linears.values())
    gradient = (_FLOAT32 + (number if rounded else 0)) * largest
    again = number * shape.layer_matrices if rounded and saved else 0
    waiting = _FLOAT32 * shape.head_parameters if shape.tied else 0  # the head's gradient, for that of the embedding
    return saved + flowing + gradient + again + waiting


def _gathered(shape: ModelShape, training: Training) -> float:
    layers = _GATHERED_LAYERS * shape.layer_parameters
    held = training.frozen * (shape.outer_parameters + layers)
    if training.reference is Reference.MODEL:
        held += _FLOAT32 * (shape.outer_parameters + layers)
    return held + (0 if training.rank else _FLOAT32 * (shape.outer_parameters + layers))
