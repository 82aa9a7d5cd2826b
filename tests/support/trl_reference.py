"""TRL's own losses, importance weights and advantages (https://huggingface.co/docs/trl), for comparison with ours.

Each function runs a trainer of TRL over the tiny model, whose settings are those of TRL's config classes. What the
trainer would ask the model, the engine or the reward functions for is given: log-probabilities, entropies, rewards.

TRL is imported when a function is called first. That takes seconds, so no module that other tests import does it.

Shapes: _B data, _N trained tokens, one datum after another, _T places of a padded batch, _V tokens of the vocabulary.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.support.tiny_model import write_tiny_model

GROUP = 8  # samples of a prompt, for TRL
UNTRAINED = -0.75  # the number at places that are not trained; it must not count


class Found(NamedTuple):
    """A loss, which has a gradient, and the metrics that the trainer logs with it."""

    loss: Tensor
    metrics: dict[str, float]


def grpo(
    counts: Sequence[int],
    log_probs_N: Tensor,
    old_log_probs_N: Tensor | None,
    advantages_N: Tensor,
    *,
    rollout_log_probs_N: Tensor | None = None,
    reference_log_probs_N: Tensor | None = None,
    entropy_N: Tensor | None = None,
    **config: Any,
) -> Found:
    """`GRPOTrainer._compute_loss` on one batch. `config` goes to GRPOConfig. Without `old_log_probs_N` the present
    policy is the old one.

    With `rollout_log_probs_N` the sampling was by vLLM, and its importance weights are computed by
    `GRPOTrainer._generate_and_score_completions`; there must then be a multiple of `GROUP` data. These numbers must be
    exact in float32, to which TRL rounds them.
    """
    trainer = _trainer("GRPO", tuple(sorted(config.items())))
    mask_BT = _padded(counts, torch.ones_like(log_probs_N), 0.0).long()
    batch: dict[str, Any] = {
        "prompt_ids": torch.full((len(counts), 1), 2),
        "prompt_mask": torch.ones((len(counts), 1), dtype=torch.long),
        "completion_ids": torch.full_like(mask_BT, 2),
        "completion_mask": torch.cat([torch.ones_like(mask_BT[:, :1]), mask_BT[:, 1:]], 1),
        "tool_mask": mask_BT,
        "advantages": _padded(counts, advantages_N),
        "num_items_in_batch": mask_BT.sum(),
    }
    if old_log_probs_N is not None:
        batch["old_per_token_logps"] = _padded(counts, old_log_probs_N)
    if reference_log_probs_N is not None:
        batch["ref_per_token_logps"] = _padded(counts, reference_log_probs_N)
    trainer.use_vllm = rollout_log_probs_N is not None
    if rollout_log_probs_N is not None:
        assert old_log_probs_N is not None, "TRL computes it where vLLM sampled"
        scored = _scored(trainer, counts, old_log_probs_N, rollout_log_probs_N, [0.0] * len(counts))
        batch["importance_sampling_ratio"] = scored.get("importance_sampling_ratio")
    log_probs_BT = _padded(counts, log_probs_N)
    entropy_BT = torch.zeros_like(log_probs_BT).detach() if entropy_N is None else _padded(counts, entropy_N)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (log_probs_BT, entropy_BT, None)
    trainer._metrics["train"].clear()
    loss = trainer._compute_loss(trainer.model, batch)
    return Found(loss, {name: values[-1] for name, values in trainer._metrics["train"].items()})


def importance_weights(
    counts: Sequence[int], old_log_probs_N: Tensor, rollout_log_probs_N: Tensor, **config: Any
) -> Tensor:
    """What `GRPOTrainer` multiplies the loss of each token by for sampling with vLLM. Conditions as in `grpo`."""
    trainer = _trainer("GRPO", tuple(sorted(config.items())))
    trainer.use_vllm = True
    scored = _scored(trainer, counts, old_log_probs_N, rollout_log_probs_N, [0.0] * len(counts))
    weights_BT = scored["importance_sampling_ratio"].expand_as(scored["completion_ids"])
    trained: Tensor = weights_BT[scored["tool_mask"].bool() & scored["completion_mask"].bool()]
    return trained


def advantages(trainer: str, groups: Sequence[Sequence[float]], **config: Any) -> list[float]:
    """Those of `GRPOTrainer` or `RLOOTrainer`, from the rewards of groups with at most `GROUP` samples.

    The groups of TRL are equally large. A smaller one here is filled up with samples without a reward, which TRL leaves
    out of means and deviations.
    """
    sizes = [len(group) for group in groups]
    rewards = [reward for group in groups for reward in (*group, *[math.nan] * (GROUP - len(group)))]
    chosen = _trainer(trainer, tuple(sorted(config.items())))
    chosen.use_vllm = False
    zeros_N = torch.zeros(len(rewards), dtype=torch.float64)
    found = _scored(chosen, [1] * len(rewards), zeros_N, zeros_N, rewards)["advantages"].view(-1, GROUP).tolist()
    return [number for row, size in zip(found, sizes, strict=True) for number in row[:size]]


def preference(
    chosen_log_probs_N: Tensor,
    rejected_log_probs_M: Tensor,
    chosen_reference_N: Tensor,
    rejected_reference_M: Tensor,
    **config: Any,
) -> Found:
    """`DPOTrainer._compute_loss` on one pair. `config` goes to DPOConfig."""
    trainer = _trainer("DPO", tuple(sorted(config.items())))
    counts = [len(chosen_log_probs_N), len(rejected_log_probs_M)]
    mask_BT = _padded(counts, torch.ones(sum(counts)), 0.0).long()

    def model(*values: Tensor) -> Any:
        # DPOTrainer sums over all places: what is no completion has 0.
        log_probs_BT = _padded(counts, torch.cat(values), 0.0)[:, 1:]
        none_BT = torch.zeros_like(log_probs_BT)
        outputs = SimpleNamespace(log_probs=log_probs_BT, entropy=none_BT, mean_logits=none_BT, is_top1=none_BT.bool())
        return lambda **_: outputs

    trainer.ref_model = model(chosen_reference_N, rejected_reference_M)
    trainer._metrics["train"].clear()
    batch = {"input_ids": torch.full_like(mask_BT, 2), "attention_mask": mask_BT, "completion_mask": mask_BT}
    loss = trainer._compute_loss(model(chosen_log_probs_N, rejected_log_probs_M), batch, False)
    return Found(loss, {name: values[-1] for name, values in trainer._metrics["train"].items()})


def divergence(student_logits_V: Tensor, teacher_logits_V: Tensor, beta: float) -> Tensor:
    """`GKDTrainer.generalized_jsd_loss` of one token."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDTrainer

    loss: Tensor = GKDTrainer.generalized_jsd_loss(student_logits_V[None], teacher_logits_V[None], beta=beta)
    return loss


def log_probs_and_entropies(model: Any, token_ids: Sequence[int], temperature: float) -> tuple[Tensor, Tensor]:
    """`GRPOTrainer._get_per_token_logps_and_entropies` of all tokens but the first."""
    trainer = _make("GRPO", {"temperature": temperature}, model)
    ids = torch.tensor([token_ids])
    found = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, torch.ones_like(ids), len(token_ids) - 1, compute_entropy=True
    )
    return found[0][0], found[1][0]


@cache
def _trainer(name: str, config: tuple[tuple[str, Any], ...]) -> Any:
    return _make(name, dict(config))


def _make(name: str, config: dict[str, Any], model: Any = None) -> Any:
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pairs = name == "DPO"
    columns = ("prompt", "chosen", "rejected") if pairs else ("prompt",)
    own = {} if pairs else {"reward_funcs": _no_reward}
    with tempfile.TemporaryDirectory() as folder:
        tiny = write_tiny_model(Path(folder))
        # As many samples in a batch as in a group: each batch is one optimizer step.
        size = {} if pairs else {"num_generations": GROUP}
        config = {"per_device_train_batch_size": GROUP, **size} | config
        config = {"output_dir": folder, "report_to": "none", "use_cpu": True, "bf16": False} | config
        trainer = getattr(trl, f"{name}Trainer")(
            model=model or AutoModelForCausalLM.from_pretrained(tiny),
            args=getattr(trl, f"{name}Config")(**config),
            train_dataset=Dataset.from_dict({column: ["w2"] for column in columns}),
            processing_class=AutoTokenizer.from_pretrained(tiny),
            **own,
        )
    trainer.current_gradient_accumulation_steps = 1  # Trainer.train sets it
    trainer.model.train()
    return trainer


def _scored(
    trainer: Any, counts: Sequence[int], old_N: Tensor, rollout_N: Tensor, rewards_B: Sequence[float]
) -> dict[str, Any]:
    """`_generate_and_score_completions` of this engine and these rewards. Each completion begins with a token that is
    not trained, as what a tool said."""
    rollout_BT = _padded(counts, rollout_N).tolist()
    ids = [[2] * (count + 1) for count in counts]
    tools = [[0, *[1] * count] for count in counts]
    sampled = [row[: count + 1] for row, count in zip(rollout_BT, counts, strict=True)]
    texts = [""] * len(counts)
    old_BT = _padded(counts, old_N)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (old_BT, None, None)
    trainer._calculate_rewards = lambda *_: torch.tensor(rewards_B, dtype=torch.float64)[:, None]
    prompts = [[2]] * len(counts)
    if type(trainer).__name__ == "RLOOTrainer":
        trainer._generate = lambda _: (prompts, ids, texts)
    else:
        trainer._generate = lambda _: (prompts, ids, tools, texts, sampled, {}, None, None)
    scored: dict[str, Any] = trainer._generate_and_score_completions([{"prompt": "w2"}] * len(counts))
    return scored


def _padded(counts: Sequence[int], values_N: Tensor, untrained: float = UNTRAINED) -> Tensor:
    """_BT. Each row begins with a place that is not trained, and is padded with such places."""
    width = max(counts) + 1
    rows = [
        torch.cat([values.new_full((1,), untrained), values, values.new_full((width - 1 - count,), untrained)])
        for values, count in zip(values_N.split(list(counts)), counts, strict=True)
    ]
    return torch.stack(rows)


def _no_reward(completions: list[str], **_: Any) -> list[float]:
    return [0.0] * len(completions)
