"""The work of a run: sequences, tokens and FLOPs of its steps, and the time that GPUs take for them.

Tokens are counted at their limits, as if no two sequences shared a prefix. So the learner's true work is less, where
answers are shorter, chains end early, or prefixes are computed once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mulligan.trainer.algorithms import Played
from mulligan.trainer.estimate.memory import Training
from mulligan.trainer.estimate.shapes import ModelShape
from mulligan.trainer.settings import RunSettings


@dataclass(frozen=True, slots=True)
class Gpu:
    """A kind of GPU: its memory in bytes, and the most FLOPs per second of dense matrix products."""

    name: str
    memory: float
    bfloat16: float
    float32: float  # torch does not use TF32 unless told to


# https://www.nvidia.com/en-us/data-center/a100/, /h100/, /h200/: SXM versions, without sparsity
GPUS: Mapping[str, Gpu] = {
    "a100": Gpu("NVIDIA A100 SXM 80 GB", 80e9, 312e12, 19.5e12),
    "h100": Gpu("NVIDIA H100 SXM 80 GB", 80e9, 989e12, 67e12),
    "h200": Gpu("NVIDIA H200 SXM 141 GB", 141e9, 989e12, 67e12),
}


@dataclass(frozen=True, slots=True)
class StepTokens:
    """A training step at the limits of its settings: sequences are trained ones, lengths are in tokens."""

    episodes: int  # and their copies
    unsampled: int  # of these: the learner alone knows the old policy's log-probabilities
    texts: int
    episode_length: int
    text_length: int
    answers: int  # tokens that the policy samples in an episode, and that are trained
    text_answers: int
    sampled: int  # in the step

    @property
    def trained(self) -> int:
        """Tokens that go through the model, of all sequences."""
        return self.episodes * self.episode_length + self.texts * self.text_length

    @property
    def longest(self) -> int:
        return max(self.episode_length, self.text_length if self.texts else 0)


def step_tokens(settings: RunSettings, plays: Played, *, turns: int, prompt: int, context: int) -> StepTokens:
    """A step in which every answer has its limit of tokens. `turns` are those of an episode, `prompt` the tokens of all
    that is not sampled in it. No sequence is longer than `context`."""
    rollout = settings.rollout
    chains = rollout.tasks_per_step * rollout.rollouts_per_task
    episode = min(context, prompt + turns * rollout.max_tokens)
    text = min(context, prompt + rollout.reflection_max_tokens)
    answers = max(1, episode - prompt)
    text_answers = max(1, text - prompt)
    return StepTokens(
        episodes=chains * (plays.episodes + plays.copies),
        unsampled=chains * plays.unsampled,
        texts=chains * plays.texts,
        episode_length=episode,
        text_length=text,
        answers=answers,
        text_answers=text_answers,
        sampled=chains * (plays.episodes * answers + plays.texts * text_answers),
    )


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs of one pass over a sequence, or over a step. Twice a matrix product's multiplications."""

    forward: float
    backward: float
    recomputed: float  # by gradient checkpointing

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward, self.recomputed + other.recomputed)

    def __mul__(self, times: float) -> Flops:
        return Flops(self.forward * times, self.backward * times, self.recomputed * times)

    @property
    def model(self) -> float:
        """What model FLOP utilisation counts: nothing twice (arXiv 2204.02311, appendix B)."""
        return self.forward + self.backward


def sequence_flops(shape: ModelShape, training: Training, length: int, trained: int) -> Flops:
    """Of a sequence of `length` tokens, of which `trained` go through the output head. Attention is causal: pairs that
    it hides are not counted.

    The backward pass has two products for each of the forward pass: with LoRA one, as the weights have no gradient.
    """
    matrices = 2.0 * length * shape.layers * shape.layer_matrices
    adapters = 2.0 * length * training.adapter_parameters(shape)
    attention = 4.0 * shape.queries * sum(_pairs(length, window) for window in shape.windows)
    head = 2.0 * trained * shape.head_parameters
    backward = 2 * (adapters + attention) + (1 if training.rank else 2) * (matrices + head)
    return Flops(matrices + adapters + attention + head, backward, matrices + adapters + attention)


def _pairs(length: int, window: int) -> float:
    """Pairs of tokens of which the later one sees the earlier one, or itself."""
    whole = length * (length + 1) / 2
    if not 0 < window < length:
        return whole
    hidden = length - window
    return whole - hidden * (hidden + 1) / 2


def step_flops(shape: ModelShape, training: Training, settings: RunSettings, step: StepTokens) -> Flops:
    """Of all sequences of a step. The KL's reference is one more forward pass. With several optimizer steps so are the
    old policy's log-probabilities, of the sequences for which they are computed."""
    episode = sequence_flops(shape, training, step.episode_length, step.answers)
    found = episode * step.episodes + sequence_flops(shape, training, step.text_length, step.text_answers) * step.texts
    forward = found.forward * (2 if training.has_kl else 1)
    algorithm = settings.algorithm
    if algorithm.optimizer_steps > 1:
        computes = algorithm.recompute_log_probs and "recompute_log_probs" not in algorithm.without_effect
        forward += found.forward if computes else episode.forward * step.unsampled
    return Flops(forward, found.backward, found.recomputed)


def seconds(flops: Flops, gpu: Gpu, training: Training, *, gpus: int, utilisation: float, checkpointing: bool) -> float:
    """The time of the learner. `utilisation` is the share of the GPUs' peak at which they compute all FLOPs, recomputed
    ones too; several GPUs divide the work evenly."""
    peak = gpu.bfloat16 if training.number == 2 else gpu.float32
    return (flops.model + (flops.recomputed if checkpointing else 0)) / (gpus * peak * utilisation)
