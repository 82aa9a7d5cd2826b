"""TRL's side of the benchmark of whole trainings: the conversations are the policy's, and episodes are whole."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from transformers import AutoTokenizer
from trl.chat_template_utils import parse_response

from benchmarks.learner.rollouts import settings_of
from benchmarks.learner.trl_rollouts import Lake, tokenizer, train
from mulligan.env.envs.frozenlake import Settings, create
from mulligan.models import EMBEDDED

LAKE = create("frozenlake-3x3", Settings(size_min=3, size_max=3, prompts="compact"))
BOARD = LAKE.start("train/00000").observation


def conversation(*said: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in (("system", "play"), ("user", BOARD), *said)]


def test_a_conversation_has_the_tokens_that_the_policy_samples_in() -> None:
    options: dict[str, Any] = {"add_generation_prompt": True, "return_dict": False}
    said = ("assistant", "```Left```")
    ours = AutoTokenizer.from_pretrained(EMBEDDED).apply_chat_template(conversation(said, ("user", BOARD)), **options)
    assert tokenizer().apply_chat_template(conversation(said, ("tool", BOARD)), **options) == ours


@pytest.mark.parametrize("last", [(), (("assistant", "play"), ("tool", "blocked\n" + BOARD))])
@pytest.mark.parametrize(
    ("answer", "text"),
    [("```Left```<|end|>", "```Left```"), ("<|end|>", ""), ("play<|end|>", "play"), ("play play", "play play")],
)
def test_every_answer_to_a_board_is_a_call(last: tuple[tuple[str, str], ...], answer: str, text: str) -> None:
    function = {"name": "answer", "arguments": {"text": text}}
    assert parsed(conversation(*last), answer)["tool_calls"] == [{"type": "function", "function": function}]


@pytest.mark.parametrize("end", ["fell into hole", "reached goal", "step limit"])
def test_there_is_no_call_after_the_end(end: str) -> None:
    said = conversation(("assistant", "```Left```"), ("tool", end))
    assert "tool_calls" not in parsed(said, "```Left```<|end|>")


def parsed(said: list[dict[str, str]], answer: str) -> dict[str, Any]:
    known = tokenizer()
    prompt = known.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
    tools = [Lake(LAKE).answer]
    found: dict[str, Any] = parse_response(known, known(answer)["input_ids"], prefix=prompt, tools=tools)
    return found


def test_trl_trains_on_whole_episodes() -> None:
    settings = settings_of(1)
    small = {"tasks_per_step": 2, "rollouts_per_task": 2, "train_tasks": 4}
    changes = {
        "rollout": settings.rollout.model_copy(update=small),
        "algorithm": settings.algorithm.model_copy(update={"optimizer_steps": 2}),
    }
    done = train(settings.model_copy(update=changes), 2)
    assert len(done.turns) == 2 * 2 * 2
    assert all(1 <= turns <= LAKE.info.max_steps for turns in done.turns)
    assert len(done.ends) == 2
    assert all(before < after for before, after in pairwise(done.ends))
