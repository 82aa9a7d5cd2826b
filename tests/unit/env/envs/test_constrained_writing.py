"""Sentences under constraints: what is asked, what is checked, and what is said of a broken rule."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mulligan.env.base import Split, UnknownTask
from mulligan.env.envs.constrained_writing.constraints import (
    FURTHER,
    LOWER_CASE,
    NO_COMMAS,
    QUESTION,
    WritingRule,
    at_most,
    begins_with,
    includes,
    no_sentence,
    sentence_of,
    without_letter,
    words_of,
)
from mulligan.env.envs.constrained_writing.environment import GOOD, INVALID, ConstrainedWriting, WritingEpisode
from mulligan.env.envs.constrained_writing.words import NOUNS
from tests.support.kinds import creator

create = creator("constrained_writing")
RIVER = [no_sentence, at_most(6), includes("river")]


def play(answer: str, *further: WritingRule, partial: bool = False) -> tuple[float | None, str]:
    result = WritingEpisode("", [*RIVER, *(rule.problem for rule in further)], partial).step(answer)
    assert result.done
    return result.reward, result.feedback


@pytest.mark.parametrize(
    "answer",
    [
        "The river is wide.",
        "River, come home!",
        ' "Is the river deep?" ',
        "**The river flows.**",
        "I love the river's river.",
        "The river isn’t well-known here.",
    ],
)
def test_a_sentence_that_keeps_all_rules(answer: str) -> None:
    assert play(answer) == (1.0, GOOD)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("The river is wide and very deep.", "It has 7 words; at most 6 are allowed."),
        ("The rivers are wide.", 'The word "river" is missing.'),
        ("The riverbed is dry.", 'The word "river" is missing.'),
        ("River.", "It has 1 word; a sentence has at least 3."),
        ("A river.", "It has 2 words; a sentence has at least 3."),
        ("The river is wide", "The sentence has no end: no full stop, question mark or exclamation mark."),
        ("The river.\nIs wide.", "It has more than one line."),
        ("The river. It flows.", "It is more than one sentence."),
        ("River river river.", 'The word "river" stands twice in a row.'),
        ("", "No sentence was written."),
        (' "" ', "No sentence was written."),
        ("...", 'It has 0 words; a sentence has at least 3. The word "river" is missing.'),
    ],
)
def test_a_broken_rule_is_named(answer: str, problem: str) -> None:
    assert play(answer) == (0.0, problem)


@pytest.mark.parametrize(
    ("rule", "kept", "broken", "problem"),
    [
        (without_letter("t"), "A river flows.", "The river flows.", 'The word "the" has the letter "t".'),
        (begins_with("s"), "See the river.", "The river flows.", 'It begins with "T", not with "S".'),
        (begins_with("s"), "see the river.", "", ""),
        (LOWER_CASE, "see the river.", "See the river.", 'It has the capital letter "S".'),
        (QUESTION, "Is it a river?", "It is a river.", "It does not end with a question mark."),
        (NO_COMMAS, "Look, not a river.".replace(",", ""), "Look, a river.", "It has a comma."),
    ],
)
def test_further_rules(rule: WritingRule, kept: str, broken: str, problem: str) -> None:
    assert play(kept, rule) == (1.0, GOOD)
    if broken:
        assert play(broken, rule) == (0.0, problem)


def test_a_partial_reward_is_the_share_of_rules_that_were_kept() -> None:
    assert play("The brook is wide.", partial=True)[0] == pytest.approx(2 / 3)  # a sentence, and short
    assert play("brook", partial=True)[0] == pytest.approx(1 / 3)
    assert play("The river is wide.", partial=True)[0] == 1
    assert play("", partial=True)[0] == 0


def test_the_task_says_all_rules() -> None:
    kinds = {"lower_case": LOWER_CASE, "question": QUESTION, "no_commas": NO_COMMAS}
    settings = {"include": 2, "further": 3, "kinds": [*kinds], "limit_min": 9, "limit_max": 9}
    game: ConstrainedWriting = create("x", settings)
    observation = game.start("train/00000").observation
    words = re.findall(r'"(\w{2,})"', observation)
    assert observation.startswith("Write a sentence of at most 9 words with the words ") and len(words) == 2
    assert all(rule.request in observation for rule in kinds.values())
    alone: ConstrainedWriting = create("x", {"include": 0, "limit_min": 9, "limit_max": 9})
    assert alone.start("train/00000").observation == "Write a sentence of at most 9 words."


def test_tasks_depend_on_id_and_seed_alone_and_test_words_are_held_out() -> None:
    first, again, other = (create("x", {"seed": seed}) for seed in (0, 0, 1))
    seen: dict[Split, set[str]] = {}
    for split in Split:
        tasks = [task.task_id for task in first.list_tasks(split, 0, 10_000)]
        shown = [first.start(task).observation for task in tasks]
        assert shown == [again.start(task).observation for task in tasks]
        assert shown != [other.start(task).observation for task in tasks]
        seen[split] = {word for text in shown for word in re.findall(r'"(\w+)"', text)}
    assert len(first.list_tasks(Split.TEST, 90, 100)) == 10
    assert not seen[Split.TRAIN] & seen[Split.TEST]
    assert len(seen[Split.TRAIN]) > 250 and len(seen[Split.TEST]) > 40


def test_a_noun_is_one_plain_word_and_occurs_once() -> None:
    assert len(set(NOUNS)) == len(NOUNS)
    assert all(words_of(noun) == [noun] for noun in NOUNS)


@pytest.mark.parametrize("task_id", ["", "train", "train/1", "train/01000", "test/00100", "dev/00000", "train/0000x"])
def test_unknown_tasks(task_id: str) -> None:
    with pytest.raises(UnknownTask):
        create("x", {}).start(task_id)


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ({"limit_min": 3}, "limit_min must be between 4 and 100, not 3"),
        ({"limit_min": 9, "limit_max": 8}, "limit_max must be between 9 and 100, not 8"),
        ({"further": 6}, "further must be between 0 and 5, not 6"),
        ({"kinds": ["questions"]}, "kinds: there is no 'questions'; did you mean"),
        ({"kinds": ["question", "question"]}, "kinds must differ"),
        ({"prompts": "tiny"}, "prompts must be one of full, short, not 'tiny'"),
    ],
)
def test_a_bad_setting_is_named(table: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        create("x", table)


def test_no_given_word_has_the_forbidden_letter() -> None:
    given_words = ["senatorio", "axe"]  # all the letters that a rule may forbid
    for seed in range(20):
        rule = FURTHER["without_letter"](given_words, random.Random(seed))
        assert rule.problem(" ".join(given_words)) == ""


def test_the_rules_of_a_task_can_be_kept_together() -> None:
    game: ConstrainedWriting = create("x", {"include": 2, "further": len(FURTHER)})
    for task in game.list_tasks(Split.TRAIN, 0, 1_000):
        request = game.start(task.task_id).observation
        begins = re.search(r'Begin with the letter "(.)"', request)
        without = re.search(r'Do not use the letter "(.)"', request)
        assert begins and without
        wanted = [begins[1].lower(), *re.findall(r'"(\w{2,})"', request)]
        assert not any(without[1] in part for part in wanted), request


@given(st.text())
def test_any_text_is_read(answer: str) -> None:
    rules = [without_letter("t"), begins_with("s"), LOWER_CASE, QUESTION]
    result = WritingEpisode("", [*RIVER, *(rule.problem for rule in rules)], True).step(answer)
    assert 0 <= (result.reward or 0) <= 1 and result.feedback
    assert (result.action == INVALID) == (sentence_of(answer) == "")
    assert no_sentence("x" + answer) or len(words_of("x" + answer)) >= 3
