from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mulligan.env.base import Split, StepResult, UnknownTask
from mulligan.env.envs.hotpotqa import world as hotpotqa_world
from mulligan.env.envs.hotpotqa.environment import (
    NOTHING_FOUND,
    SEARCH,
    HotpotQa,
    HotpotQaEpisode,
    Settings,
)
from mulligan.env.search import Bm25
from tests.support.effort import HOSTILE_CHARACTERS, LINEAR_TIME
from tests.support.kinds import creator
from tests.support.paths import IMPORT_ROOTS, ROOT

create = creator("hotpotqa")


class Asked:
    def __init__(self, question: str, answer: str) -> None:
        self.question = question
        self.answer = answer
        self.difficulty = 2.0


INDEX = Bm25.build([("Ada", "Ada was born in Vell. " + "x" * 400), ("Vell", "Vell lies on the river Sorn.")])


def episode(**settings: Any) -> HotpotQaEpisode:
    return HotpotQaEpisode(Asked("On which river is Ada's birthplace?", "the Sorn"), INDEX, Settings(**settings))


def call(query: str, **more: object) -> str:
    arguments = {"query": query} | more
    return f"<tool_call>\n{json.dumps({'name': 'local_search', 'arguments': arguments})}\n</tool_call>"


@pytest.fixture(scope="module")
def world() -> HotpotQa:
    environment: HotpotQa = create("hotpotqa", {})
    return environment


def test_searches_and_answers() -> None:
    game = episode()
    assert game.observation == "On which river is Ada's birthplace?"
    first = game.step("I search.\n" + call("Where was Ada born?"))
    assert first.observation.startswith("[Document 1] Ada (score ")
    body = first.observation.splitlines()[1]
    assert body == "Ada was born in Vell. " + "x" * (300 - 22) + "..."
    assert (first.tool, first.action) == ("local_search", 'local_search(query="Where was Ada born?")')
    assert (first.reward, first.done, first.feedback) == (0.0, False, "")
    second = game.step(call("Vell river", top_k=1))
    assert second.observation.count("[Document") == 1 and "Sorn" in second.observation
    last = game.step(r"The river is \boxed{Sorn}.")
    assert (last.reward, last.done, last.truncated, last.action) == (1.0, True, False, "answer: Sorn")
    assert last.feedback == "Correct. Reward 1.00. Extracted answer: Sorn. Scored by exact match."
    assert last.tool == ""


def test_several_calls_of_a_turn_are_all_answered() -> None:
    result = episode().step(call("Ada") + call("river", top_k=1) + call(""))
    assert result.observation.count("[Document 1]") == 2
    assert "arguments of local_search are wrong: query" in result.observation
    assert result.action.count("local_search") == 3 and result.tool == "local_search"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("<tool_call>{bad</tool_call>", "The tool call could not be read: the call is not valid JSON"),
        (
            '<tool_call>{"name": "google", "arguments": {}}</tool_call>',
            "There is no tool 'google'; there is: local_search",
        ),
        (call("x", top_k="many"), "The arguments of local_search are wrong: top_k"),
        (call("x", top_k=0), "The arguments of local_search are wrong: top_k"),
        (
            '<tool_call>{"name": "local_search", "arguments": {"query": "\\ud800"}}</tool_call>',
            "query: Input should be",
        ),
    ],
)
def test_a_wrong_call_is_said_to_be_wrong_and_costs_a_turn(answer: str, words: str) -> None:
    game = episode(max_steps=2)
    result = game.step(answer)
    assert words in result.observation and not result.done and result.tool == ""
    assert game.step("I give up").done


def test_a_template_without_tools_is_given_no_tool_messages() -> None:
    result = episode(tools="prompt").step(call("Ada"))
    assert result.tool == "" and "[Document 1] Ada" in result.observation


def test_nothing_found_is_said() -> None:
    assert episode().step(call("zzz")).observation == NOTHING_FOUND


def test_no_more_than_the_published_number_of_passages(world: HotpotQa) -> None:
    game = world.start(world.list_tasks(Split.TEST, 0, 1)[0].task_id)
    assert game.step(call("town river region", top_k=50)).observation.count("[Document") == 5


def test_an_answer_without_a_box_is_none() -> None:
    result = episode().step("It is the Sorn.")
    assert (result.reward, result.done, result.truncated) == (0.0, True, False)
    assert result.action == "no boxed answer" and result.feedback.startswith("No answer. Reward 0.00.")


def test_the_turns_end_where_the_prompt_says() -> None:
    game = episode()
    assert "at most 5 turns" in create("x", {}).info.prompts.solver
    results = [game.step(call("Ada")) for _ in range(5)]
    assert [result.done for result in results] == [False] * 4 + [True]
    assert results[-1].truncated and results[-1].reward == 0.0
    assert results[-1].feedback == "The turns were used up. Reward 0.00. There was no boxed answer."
    late = episode(max_steps=1).step(call("Ada") + r" \boxed{the Sorn}")
    assert (late.reward, late.truncated) == (1.0, False)


def test_feedback_never_tells_the_answer() -> None:
    for answer in (r"\boxed{Bel}", "no box", call("x"), r"\boxed{}", r"\boxed{the river Bel}"):
        assert "sorn" not in episode(max_steps=1).step(answer).feedback.lower()
    partly = episode().step(r"\boxed{River Sorn}")
    assert partly.feedback == "Partly correct. Reward 0.67. Extracted answer: River Sorn. Scored by F1."


hostile = st.text() | st.text(alphabet='<tool_call>/{}[]"\\:,() boxed', max_size=60)


@given(st.lists(hostile | st.builds(call, hostile), min_size=5, max_size=5))
def test_any_text_is_an_action(texts: list[str]) -> None:
    game = episode()
    for number, text in enumerate(texts, start=1):
        result = game.step(text)
        (result.observation + result.action + result.feedback).encode()
        assert result.observation and result.action and bool(result.feedback) == result.done
        assert result.done or number < 5
        if result.done:
            return


@LINEAR_TIME
def test_hostile_length_is_no_hostile_time() -> None:
    for part in ("\\boxed{", call("x"), "{", "<think>"):
        episode().step(part * (HOSTILE_CHARACTERS // len(part)))


def follow(world: HotpotQa, record: dict[str, Any], split: Split) -> StepResult:
    """Searches for each paragraph that the answer rests on, and answers right."""
    game = world.start(f"{split}/{record['_id']}")
    assert game.observation == record["question"]
    for title, sentence in record["supporting_facts"]:
        (text,) = (sentences for name, sentences in record["context"] if name == title)
        shown = game.step(call(title)).observation
        assert text[sentence].strip() in shown
        last = shown
    if record["answer"] not in ("yes", "no") and record["level"] != "easy":
        assert record["answer"] in last
    return game.step(f"\\boxed{{{record['answer']}}}")


def test_every_question_can_be_answered_by_searching(world: HotpotQa) -> None:
    train, test = hotpotqa_world.data_sets()
    assert (len(train), len(test)) == (1_000, 100)
    for split, records in ((Split.TRAIN, train[:200]), (Split.TEST, test)):
        assert all(follow(world, record, split).reward == 1.0 for record in records)
    assert {task.difficulty for task in world.list_tasks(Split.TEST, 0, 100)} == {1.0, 2.0, 3.0}


def test_the_world_is_in_the_official_format_and_its_splits_are_disjoint() -> None:
    train, test = hotpotqa_world.data_sets()
    assert not {record["question"] for record in train} & {record["question"] for record in test}
    assert len({record["_id"] for record in train + test}) == 1_100
    for record in train + test:
        assert set(record) == {"_id", "question", "answer", "type", "level", "supporting_facts", "context"}
        assert re.fullmatch("[0-9a-f]{24}", record["_id"])
        assert (record["type"], record["level"]) in {
            ("bridge", "medium"),
            ("bridge", "hard"),
            ("comparison", "easy"),
        }
        titles = [title for title, _ in record["context"]]
        assert len(titles) == len(set(titles)) == 10
        assert {title for title, _ in record["supporting_facts"]} <= set(titles)
    answers = [record["answer"] for record in train]
    assert 0.5 < answers.count("yes") / answers.count("no") < 2  # guessing pays for neither


def test_the_world_is_the_same_everywhere(tmp_path: Path) -> None:
    hotpotqa_world.write(tmp_path / "here")
    subprocess.run(
        [sys.executable, "-m", "mulligan.env.envs.hotpotqa.world", str(tmp_path / "there")],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": IMPORT_ROOTS},
        check=True,
    )
    digest = hashlib.sha256()
    for name in (hotpotqa_world.TRAIN_FILE, hotpotqa_world.TEST_FILE, hotpotqa_world.FULLWIKI_FILE):
        content = (tmp_path / "here" / name).read_bytes()
        assert content == (tmp_path / "there" / name).read_bytes()
        digest.update(content)
    # Pinned: a task must stay what it was when results were published.
    assert digest.hexdigest()[:16] == "46f214c4ca43f8d9"
    assert hotpotqa_world.data_sets(1) != hotpotqa_world.data_sets(0)


def test_dense_search_is_a_setting() -> None:
    settings = {"retriever": "dense", "encoder": "tests.support.encoders", "encoder_settings": {"letters": "abc"}}
    world = create("x", settings)
    result = world.start(world.list_tasks(Split.TRAIN, 0, 1)[0].task_id).step(call("cab"))
    assert result.observation.count("[Document") == 5


@pytest.mark.parametrize("task_id", ["", "train", "test/", "train/00000", "test/../x", "test/\0"])
def test_unknown_tasks(world: HotpotQa, task_id: str) -> None:
    with pytest.raises(UnknownTask):
        world.start(task_id)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"results": 0}, "results"),
        ({"passage_characters": 0}, "passage_characters"),
        ({"max_steps": 0}, "max_steps"),
        ({"train_tasks": -1}, "train_tasks"),
        ({"retriever": "grep"}, "retriever"),
        ({"tools": "none"}, "tools"),
        ({"corpus": ["x"]}, "corpus"),
        ({"train_file": "/no/such"}, "train_file"),
        ({"retriever": "dense", "encoder": "no_such"}, "encoder"),
        ({"encoder_settings": 3}, "encoder_settings"),
    ],
)
def test_settings_errors_name_the_setting(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        create("x", changes)


def test_the_agent_is_told_of_the_tool_once() -> None:
    template = create("x", {})
    prompt = create("x", {"tools": "prompt", "max_steps": 3})
    assert template.info.tools == (SEARCH,) and prompt.info.tools == ()
    for text in ("solver", "action_reminder", "retry", "try_again"):
        assert "<tools>" not in getattr(template.info.prompts, text)
        told = getattr(prompt.info.prompts, text)
        assert "at most 3 turns" in told and "\\boxed{}" in told
        (line,) = re.findall(r'^\{"type".*\}$', told, re.M)
        function = json.loads(line)["function"]
        assert (function["name"], function["parameters"]) == (SEARCH.name, json.loads(SEARCH.parameters))
