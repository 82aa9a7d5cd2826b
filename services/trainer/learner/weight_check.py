"""The learner's side of the weight check: its log-probabilities on fixed token sequences.

After an update the policy service compares the engine's log-probabilities with them. The sequences depend on the model
only, so equal weights always give equal probes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mulligan.common.inference import CanaryProbe
from mulligan.trainer.data import ModelLimits

# Random tokens use rows of the embedding that text seldom uses; text uses the weights that training changes most.
RANDOM_SEQUENCES = 4
RANDOM_TOKENS = 32
TEXT_TOKENS = 64
TEXT = """The canary went down into the mine before the people did. It sang while the air was good, and when it fell \
silent they turned back. Nobody asked the bird how it felt: 1, 2, 3 steps, then up again, into the light."""

ProbeTokens = tuple[tuple[int, ...], ...]


def probe_sequences(tokenizer: Any, limits: ModelLimits) -> ProbeTokens:
    """Token sequences within vocabulary and context, each of at least two tokens."""
    vocabulary = min(limits.vocabulary_size, len(tokenizer))  # embeddings may have unused rows
    drawn = random.Random(f"canary/{vocabulary}")
    longest = limits.context_length or RANDOM_TOKENS + TEXT_TOKENS  # 0: not known
    length = min(RANDOM_TOKENS, longest)
    text = tokenizer.encode(TEXT, add_special_tokens=False)[: min(TEXT_TOKENS, longest)]
    sequences = [[drawn.randrange(vocabulary) for _ in range(length)] for _ in range(RANDOM_SEQUENCES)]
    return tuple(tuple(sequence) for sequence in [*sequences, text] if len(sequence) > 1)


def probes(model: Any, sequences: ProbeTokens, dtype: torch.dtype) -> tuple[CanaryProbe, ...]:
    """The log-probabilities of each token after the first, from softmax(logits).

    The forward pass uses the weights as published: rounded to `dtype`, and computed in it.
    """
    weights = {name: parameter.detach().to(dtype) for name, parameter in model.named_parameters()}

    def logits(ids_BT: Tensor) -> Tensor:
        arguments = {"input_ids": ids_BT, "use_cache": False}
        found: Tensor = torch.func.functional_call(model, weights, kwargs=arguments).logits
        return found

    return probes_of(logits, sequences, next(iter(weights.values())).device)


def probes_of(
    logits: Callable[[Tensor], Tensor], sequences: ProbeTokens, device: torch.device
) -> tuple[CanaryProbe, ...]:
    """The same of a function that computes logits_BTV from ids_BT."""
    ids_BT = pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True)  # no real token sees the padding
    ids_BT = ids_BT.to(device)
    with torch.no_grad():
        log_probs_BTV = logits(ids_BT)[:, :-1].float().log_softmax(-1)
        log_probs_BT = log_probs_BTV.gather(-1, ids_BT[:, 1:, None])[..., 0]
    return tuple(
        CanaryProbe(ids, tuple(row[: len(ids) - 1])) for ids, row in zip(sequences, log_probs_BT.tolist(), strict=True)
    )
