"""Trains FrozenLake by TRL's GRPOTrainer with `environment_factory`, and prints its rollouts per second:
`python -m benchmarks.learner.trl_rollouts --settings JSON`, a process of `benchmarks.learner.rollouts`.

TRL's agents act by tool calls (https://huggingface.co/docs/trl/main/en/openenv), and the embedded model has never
written one. So TRL gets a chat template that writes what a tool says as the user's message, and a response template
(https://huggingface.co/docs/transformers/main/en/chat_response_parsing) by which each answer to a board is the call
`answer(text)`. The tokens of a conversation are those that Mulligan's policy samples in; `GRPOTrainer` is as it is.

After the last result of a tool TRL has the agent write once more, so a conversation has one message more than turns.
That result is not the last board but what Mulligan gives as feedback, such as "fell into hole", which is shorter.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from mulligan.env.base import Environment, Episode, Split
from mulligan.env.config import EnvSettings
from mulligan.models import EMBEDDED
from mulligan.trainer.losses import ppo
from mulligan.trainer.settings import RunSettings

# The tool's name and its arguments have to be somewhere, or TRL refuses the template. No conversation that is sampled
# has them: TRL appends the tokens of an answer as they are.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + ('user' if message['role'] == 'tool' else message['role']) + '|>' + message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ call['function']['name'] }}{{ call['function']['arguments'] | tojson }}"
    "{% endfor %}"
    "{{ '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Reading begins at the user's last message. A board has several lines; what is said at the end has one.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|user|>",
    "fields": {
        "tool_calls": {
            "open_pattern": r"\A[^<]*\n[^<]*<\|end\|>\s*<\|assistant\|>",
            "close": "<|end|>",
            "repeats": True,
            "content": "text",
            "transform": {"type": "function", "function": {"name": "answer", "arguments": {"text": "{content}"}}},
        }
    },
}
COMPLETION_TOKENS = 512  # of an episode: more than its turns can have


@dataclass
class Lake:
    """An environment as TRL wants it: `reset` starts the episode of a row of the dataset, and `answer` is the tool.

    `turns` has those of each episode that was played to its end.
    """

    environment: Environment
    turns: list[int] = field(default_factory=list)
    _episode: Episode | None = None
    _turn: int = 0
    _reward: float = 0.0

    def reset(self, task_id: str, **_: object) -> str:
        self._episode = self.environment.start(task_id)
        self._turn = 0
        self._reward = 0.0
        return self._episode.observation

    def answer(self, text: str) -> str:
        """
        Plays a turn.

        Args:
            text: The answer to the board.

        Returns:
            The board, or how the episode ended.
        """
        if self._episode is None:
            raise ValueError("the episode is over")
        result = self._episode.step(text)
        self._turn += 1
        self._reward += result.reward
        if not result.done:
            return result.observation
        self.turns.append(self._turn)
        self._episode = None
        return result.feedback

    def get_reward(self) -> float:
        return self._reward


class Clock(TrainerCallback):
    """When each step of training ended, in seconds; it has so many optimizer steps."""

    def __init__(self, optimizer_steps: int):
        self.optimizer_steps = optimizer_steps
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.optimizer_steps == 0:
            self.ends.append(time.perf_counter())


@dataclass(frozen=True)
class Training:
    """What a run of TRL did: when its steps ended, in seconds, and the turns of each episode that came to its end."""

    ends: Sequence[float]
    turns: Sequence[int]


def train(settings: RunSettings, steps: int) -> Training:
    """Trains `steps` steps. The run has `train_tasks`, and each is played once before one is played again."""
    environment = EnvSettings().create_environments()[settings.environment]
    tasks = environment.list_tasks(Split.TRAIN, 0, settings.rollout.train_tasks)
    lakes: list[Lake] = []

    def factory() -> Lake:
        lakes.append(Lake(environment))
        return lakes[-1]

    messages = [{"role": "system", "content": environment.info.prompts.solver}, {"role": "user", "content": ""}]
    dataset = Dataset.from_dict({"prompt": [messages] * len(tasks), "task_id": [task.task_id for task in tasks]})
    clock = Clock(settings.algorithm.optimizer_steps)
    with TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32, use_safetensors=True),
            args=config(settings, steps, environment.info.max_steps, Path(folder)),
            train_dataset=dataset,
            processing_class=tokenizer(),
            callbacks=[clock],
            environment_factory=factory,
        )
        trainer.train()
    return Training(clock.ends, [turns for lake in lakes for turns in lake.turns])


def tokenizer() -> Any:
    found = AutoTokenizer.from_pretrained(EMBEDDED)
    found.chat_template = CHAT_TEMPLATE
    found.response_template = RESPONSE_TEMPLATE
    return found


def config(settings: RunSettings, steps: int, turns: int, folder: Path) -> GRPOConfig:
    """The run's settings in TRL's names. The loss has another constant factor, which AdamW does not see."""
    rollout, optimizer, loss = settings.rollout, settings.optimizer, settings.loss
    assert isinstance(loss, ppo.Settings)
    per_step = settings.algorithm.optimizer_steps
    return GRPOConfig(
        output_dir=str(folder),
        max_steps=steps * per_step,
        num_generations=rollout.rollouts_per_task,
        steps_per_generation=per_step,
        per_device_train_batch_size=rollout.tasks_per_step * rollout.rollouts_per_task // per_step,
        max_completion_length=COMPLETION_TOKENS,
        max_tool_calling_iterations=turns,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        generation_kwargs={"max_new_tokens": rollout.max_tokens},
        loss_type="dr_grpo",  # sums over tokens, as the recipe's aggregation does
        scale_rewards="group" if settings.algorithm.normalize_by_std else "none",
        beta=loss.kl_coefficient,
        epsilon=loss.clip_low,
        epsilon_high=loss.clip_high,
        delta=loss.dual_clip or None,
        learning_rate=optimizer.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=optimizer.warmup_steps,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        max_grad_norm=optimizer.max_grad_norm,
        save_steps=settings.checkpoint_every * per_step,
        save_total_limit=settings.keep_checkpoints,
        seed=settings.seed,
        # What TRL has otherwise on a GPU, and what only costs time here.
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        logging_strategy="no",
        report_to="none",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--settings", required=True, help="of a run, as JSON")
    parser.add_argument("--steps", type=int, required=True, help="steps that are measured")
    parser.add_argument("--warm-up", type=int, default=1, help="steps before them")
    arguments = parser.parse_args()
    settings = RunSettings.model_validate_json(arguments.settings)
    done = train(settings, arguments.warm_up + arguments.steps)
    per_step = settings.rollout.tasks_per_step * settings.rollout.rollouts_per_task
    if len(done.turns) != per_step * (arguments.warm_up + arguments.steps):
        sys.exit(f"TRL ended {len(done.turns)} episodes; expected {per_step} in each step")
    print(per_step * arguments.steps / (done.ends[-1] - done.ends[arguments.warm_up - 1]))


if __name__ == "__main__":
    main()
