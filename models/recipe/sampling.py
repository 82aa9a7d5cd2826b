"""Samples many conversations with a model at once, in this process. Only for measuring: it is no inference engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase, Qwen3ForCausalLM

from mulligan.env.base import EnvironmentInfo, Episode, PromptSet, StepResult
from mulligan.models.build import ASSISTANT, END, SYSTEM, USER

ACTION_TOKENS = 3  # "```Up```" and the end mark, and one to spare
LEGEND_TOKENS = 24


@dataclass(frozen=True)
class Sampling:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def chances(self, logits: Tensor) -> Tensor:
        logits = logits / self.temperature
        if self.top_k:
            lowest = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < lowest, float("-inf"))
        chances = logits.softmax(dim=-1)
        if self.top_p < 1.0:
            ordered, order = chances.sort(dim=-1, descending=True)
            beyond = ordered.cumsum(dim=-1) - ordered >= self.top_p
            chances = chances.masked_fill(beyond.gather(1, order.argsort(dim=-1)), 0.0)
        return chances


PAPER_VALIDATION = Sampling(0.7, 0.8, 20)


class Conversations:
    """Conversations as rows of one growing key-value cache. Shorter rows are padded on the left and masked."""

    def __init__(self, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: int, seed: int) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self._cache = DynamicCache(config=model.config)
        self._mask = torch.zeros(rows, 0, dtype=torch.long)
        self._random = torch.Generator().manual_seed(seed)
        self._logits: Tensor | None = None
        self._held: list[list[int]] = [[] for _ in range(rows)]  # end marks of answers, fed with the next text

    @torch.inference_mode()
    def _feed(self, tokens: Tensor, mask: Tensor) -> None:
        self._mask = torch.cat([self._mask, mask], dim=1)
        positions = (self._mask.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        output = self.model(
            input_ids=tokens,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            logits_to_keep=1,
        )
        self._logits = output.logits[:, -1]

    def tell(self, texts: Sequence[str]) -> None:
        pieces: list[list[int]] = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        self._feed_rows([held + piece for held, piece in zip(self._held, pieces, strict=True)])
        self._held = [[] for _ in texts]

    def answers(self, sampling: Sampling, limit: int) -> list[str]:
        """Samples answers up to the end mark or `limit`. The end mark is then added to every conversation."""
        end = self.tokenizer.get_vocab()[END]
        going = torch.ones(len(self._mask), dtype=torch.bool)
        sampled: list[list[int]] = [[] for _ in going]
        for index in range(limit):
            assert self._logits is not None, "nothing has been told yet"
            token = torch.multinomial(sampling.chances(self._logits), 1, generator=self._random)[:, 0]
            going = going & (token != end) & (index < limit - 1)
            if not going.any():
                break
            for row in going.nonzero()[:, 0].tolist():
                sampled[row].append(int(token[row]))
            self._feed(token[:, None], going.long()[:, None])
        self._held = [[end] for _ in sampled]
        return self.tokenizer.batch_decode(sampled)

    def _feed_rows(self, rows: list[list[int]]) -> None:
        longest = max(len(row) for row in rows)
        tokens = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        self._feed(tokens, mask)


@dataclass(frozen=True)
class SampledAttempt:
    trace: str
    feedback: str
    reward: float
    steps: int


def attempt_all(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    info: EnvironmentInfo,
    tasks: Sequence[tuple[Episode, str]],
    sampling: Sampling,
    seed: int = 0,
) -> list[SampledAttempt]:
    """Plays all `tasks`: new episodes, each with its system prompt."""
    episodes = [episode for episode, _ in tasks]
    chat = Conversations(model, tokenizer, len(tasks), seed)
    traces = [""] * len(tasks)
    shown = [episode.observation for episode in episodes]
    opening = [SYSTEM + system + END for _, system in tasks]
    last: list[StepResult | None] = [None] * len(tasks)
    steps = [0] * len(tasks)
    for _ in range(info.max_steps):
        chat.tell([before + USER + text + END + ASSISTANT for before, text in zip(opening, shown, strict=True)])
        opening = [""] * len(tasks)
        for row, answer in enumerate(chat.answers(sampling, ACTION_TOKENS)):
            before = last[row]
            if before is not None and before.done:
                continue
            result = episodes[row].step(answer)
            traces[row] += turn_text(info.prompts, shown[row], result.action)
            last[row] = result
            shown[row] = result.observation
            steps[row] = steps[row] + 1
        if all(result is not None and result.done for result in last):
            break
    return [
        SampledAttempt(trace + text, result.feedback, result.reward, count)
        for trace, text, result, count in zip(traces, shown, last, steps, strict=True)
        if result is not None
    ]


def turn_text(prompts: PromptSet, observation: str, action: str) -> str:
    return prompts.trace_turn.replace("{observation}", observation).replace("{action}", action)


def reflect_all(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptSet,
    failures: Sequence[tuple[SampledAttempt, str]],
    sampling: Sampling,
    seed: int = 0,
    legend_tokens: int = LEGEND_TOKENS,
) -> list[str]:
    """Reflects on all `failures`: failed attempts, each with the text of the memory, which may be empty."""
    chat = Conversations(model, tokenizer, len(failures), seed)
    chat.tell(
        [
            f"{SYSTEM}{prompts.reflection_system}{END}{USER}{reflection_text(prompts, *failure)}{END}{ASSISTANT}"
            for failure in failures
        ]
    )
    answers = chat.answers(sampling, legend_tokens)
    return [
        answer.rpartition(prompts.reflection_open)[2].partition(prompts.reflection_close)[0].strip()
        for answer in answers
    ]


def reflection_text(prompts: PromptSet, attempt: SampledAttempt, memory: str) -> str:
    filled = prompts.reflection.replace("{reward}", str(attempt.reward)).replace("{trace}", attempt.trace)
    return filled.replace("{feedback}", attempt.feedback).replace("{memory}", memory or prompts.memory_empty)
