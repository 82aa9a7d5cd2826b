"""The gradient of the same data by TRL's GRPOTrainer (https://huggingface.co/docs/trl), for `benchmarks.learner`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mulligan.trainer.data import Datum, PolicyGradient
from mulligan.trainer.settings import LoraSettings


class TrlStep:
    """Computes gradients as `GRPOTrainer.training_step` does, micro-batch by micro-batch.

    A datum is a prompt (all before the first trained token) and a completion; what the environment said in it is
    masked, as TRL masks what tools say. Targets of distillation are rows with an advantage of 1, as TRL has no other.
    """

    def __init__(self, model: Path, rows: int, lora: LoraSettings | None = None):
        """`rows` is TRL's per_device_train_batch_size."""
        from datasets import Dataset
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import GRPOConfig, GRPOTrainer

        self.rows = rows
        with tempfile.TemporaryDirectory() as folder:
            config = GRPOConfig(
                output_dir=folder,
                report_to="none",
                use_cpu=True,
                bf16=False,
                per_device_train_batch_size=rows,
                num_generations=rows,
                loss_type="dapo",
                beta=0.0,
            )
            self._trainer: Any = GRPOTrainer(
                model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, use_safetensors=True),
                args=config,
                train_dataset=Dataset.from_dict({"prompt": ["a"]}),
                processing_class=AutoTokenizer.from_pretrained(model),
                reward_funcs=lambda completions, **_: [0.0] * len(completions),
                peft_config=None if lora is None else LoraConfig(r=lora.rank, target_modules="all-linear"),
            )
        self._trainer.current_gradient_accumulation_steps = 1  # Trainer.train sets it
        self._trainer.model.train()

    def gradients(self, calls: Sequence[list[Datum]]) -> None:
        """Computes a gradient for each call, and drops it."""
        for data in calls:
            self._backward(data)
            self._trainer.model.zero_grad(set_to_none=True)

    def step(self, data: list[Datum]) -> None:
        """One step of AdamW."""
        self._backward(data)
        self._trainer.create_optimizer()
        self._trainer.optimizer.step()
        self._trainer.model.zero_grad(set_to_none=True)

    def _backward(self, data: list[Datum]) -> None:
        ordered = sorted(data, key=lambda datum: len(datum.token_ids))  # to TRL's advantage: less padding
        for start in range(0, len(ordered), self.rows):
            loss = self._trainer.compute_loss(self._trainer.model, inputs(ordered[start : start + self.rows]))
            self._trainer.accelerator.backward(loss)


def inputs(data: Sequence[Datum]) -> dict[str, torch.Tensor]:
    """A batch as GRPOTrainer makes it. Shapes: _BP prompts, padded on the left; _BC completions, on the right."""
    starts = [datum.loss_mask.index(True) for datum in data]
    prompts = [datum.token_ids[:start] for datum, start in zip(data, starts, strict=True)]
    completions = [datum.token_ids[start:] for datum, start in zip(data, starts, strict=True)]
    masks = [datum.loss_mask[start:] for datum, start in zip(data, starts, strict=True)]
    width = max(map(len, completions))
    advantages = torch.tensor(
        [datum.objective.advantage if isinstance(datum.objective, PolicyGradient) else 1.0 for datum in data]
    )
    return {
        "prompt_ids": _padded(prompts, max(map(len, prompts)), left=True),
        "prompt_mask": _padded([[1] * len(row) for row in prompts], max(map(len, prompts)), left=True),
        "completion_ids": _padded(completions, width),
        "completion_mask": _padded([[1] * len(row) for row in completions], width),
        "tool_mask": _padded([[int(one) for one in row] for row in masks], width),
        "advantages": advantages,
        "num_items_in_batch": torch.tensor(sum(sum(datum.loss_mask) for datum in data)),
    }


def _padded(rows: Sequence[Sequence[int]], width: int, *, left: bool = False) -> torch.Tensor:
    found = torch.zeros(len(rows), width, dtype=torch.int64)
    for place, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        found[place, where] = torch.tensor(row)
    return found
