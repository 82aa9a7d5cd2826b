"""Questions from files: formats, splits, errors, and the sixty that come along."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from mulligan.env.answers import AnswerFormat
from mulligan.env.base import Environment, Split, UnknownTask, Versions, act
from mulligan.env.envs.questions.environment import FROM_DATA, NO_RIGHT_CHOICE, QuestionEpisode, Questions
from mulligan.env.envs.questions.steer_bench import STEERING
from tests.support.kinds import creator

create = creator("questions")
ALL = 10_000


def asked(environment: Environment, split: Split = Split.TRAIN) -> dict[str, QuestionEpisode]:
    """The episodes of a split by task id."""
    started: dict[str, Any] = {
        task.task_id: environment.start(task.task_id) for task in environment.list_tasks(split, 0, ALL)
    }
    return started


def write(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def of_file(path: Path, *records: object, **settings: object) -> Questions:
    """An environment whose questions, all for testing, are these records."""
    read: Questions = create("x", {"test_file": write(path, *records), **settings})
    return read


@pytest.fixture(scope="module")
def sample() -> Questions:
    made: Questions = create("questions", {})
    return made


# The questions that come along


def records() -> list[dict[str, Any]]:
    from mulligan.env.envs import questions

    folder = Path(questions.__file__).parent
    lines = [line for name in ("train", "test") for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    return [json.loads(line) for line in lines]


def test_sixty_questions_come_along(sample: Questions) -> None:
    assert sample.info.task_counts == {Split.TRAIN: 48, Split.TEST: 12}
    passages = {split: {game.observation.split("\n\n")[0] for game in asked(sample, split).values()} for split in Split}
    assert not passages[Split.TRAIN] & passages[Split.TEST]
    for split in Split:
        assert set(sample.versions(split, FROM_DATA)) == {Versions.BOTH}


@pytest.mark.parametrize("record", records(), ids=lambda record: str(record["id"]))
def test_each_takes_its_answers_alone_and_has_a_version_that_takes_none(
    sample: Questions, record: dict[str, Any]
) -> None:
    (task_id,) = [one for split in Split for one in asked(sample, split) if one.endswith(f"/{record['id']}")]
    answers = record["answer"] if isinstance(record["answer"], list) else [record["answer"]]
    wrong = ["I don't know.", "7001", "", *({"A", "B", "C", "D"} - set(map(str, answers)))]
    unanswerable = sample.start_unanswerable(task_id, FROM_DATA)
    assert unanswerable.observation != sample.start(task_id).observation
    assert record["unanswerable"] in unanswerable.observation
    for reply in [*map(str, answers), *wrong]:
        result = sample.start(task_id).step(f"So \\boxed{{{reply}}}.")
        assert result.done and result.reward == (1.0 if reply in map(str, answers) else 0.0)
        assert sample.start_unanswerable(task_id, FROM_DATA).step(f"\\boxed{{{reply}}}").reward == 0.0


# A turn


def test_what_a_reply_leads_to(tmp_path: Path) -> None:
    environment = of_file(tmp_path / "x", {"id": 7, "question": "How many?", "answer": 3, "context": "Three came."})
    game = environment.start("test/7")
    assert game.observation == "Three came.\n\nHow many?"
    right = game.fork().step("\\boxed{3}")
    assert (right.reward, right.action, right.feedback, right.done) == (1.0, "3", "Correct.", True)
    wrong = game.step("\\boxed{4}")
    assert (wrong.reward, wrong.action, wrong.feedback) == (0.0, "4", "Incorrect. Answer read: 4.")
    none = environment.start("test/7").step("I am not sure")
    assert (none.action, none.feedback) == ("invalid", "Incorrect. No answer was found.")


def test_the_right_answer_is_told_if_a_setting_says_so(tmp_path: Path) -> None:
    environment = of_file(tmp_path / "x", {"id": 7, "question": "Who?", "answer": ["Ida", "Ada"]}, tell_answer=True)
    assert environment.start("test/7").step("\\boxed{Udo}").feedback.endswith("Expected: Ida or Ada.")


def test_an_answer_in_a_thought_is_no_answer(sample: Questions) -> None:
    assert act(sample.start("train/number-01"), "<think>\\boxed{11}</think> hm").reward == 0.0
    assert sample.start("train/number-01").step("<think>\\boxed{11}</think> hm").reward == 0.0
    assert sample.start("train/number-01").step("<think>\\boxed{5}</think> \\boxed{11}").reward == 1.0


def test_choices_are_lettered_and_may_be_without_the_right_one(tmp_path: Path) -> None:
    record = {"id": "x", "question": "Which?", "choices": ["ant", "bee", "cat"], "answer": "bee"}
    environment = of_file(tmp_path / "x", record)
    assert environment.start("test/x").observation == "Which?\nA. ant\nB. bee\nC. cat"
    assert environment.start("test/x").step("\\boxed{B}").reward == 1.0
    assert environment.versions(Split.TEST, FROM_DATA) == [Versions.ANSWERABLE]
    assert environment.versions(Split.TEST, NO_RIGHT_CHOICE) == [Versions.BOTH]
    changed = environment.start_unanswerable("test/x", NO_RIGHT_CHOICE)
    assert changed.observation == "Which?\nA. ant\nB. cat"
    assert changed.step("\\boxed{B}").reward == 0.0
    with pytest.raises(UnknownTask):
        environment.start_unanswerable("test/x", FROM_DATA)


# Splits and ids


def test_a_tenth_is_for_testing_and_no_question_is_in_both_splits(tmp_path: Path) -> None:
    lines = [{"question": f"How much is {number} and 0?", "answer": number} for number in range(500)]
    environment: Questions = create("x", {"train_file": write(tmp_path / "x", *lines)})
    train, test = (asked(environment, split) for split in Split)
    assert len(train) + len(test) == 500 and 20 <= len(test) <= 80
    assert not {game.observation for game in train.values()} & {game.observation for game in test.values()}
    fewer: Questions = create("x", {"train_file": str(tmp_path / "x"), "train_tasks": 30, "test_tasks": 3})
    assert list(asked(fewer)) == list(train)[:30] and list(asked(fewer, Split.TEST)) == list(test)[:3]


def test_questions_of_the_test_file_are_not_for_training(tmp_path: Path) -> None:
    train = write(
        tmp_path / "train",
        {"question": "One?", "answer": 1},
        {"question": "TWO? ", "answer": 2},
        {"question": "Three?", "unanswerable": "Four?", "answer": 3},
    )
    test = write(tmp_path / "test", {"question": "Two?", "answer": 2}, {"question": "Four?", "answer": 4})
    environment: Questions = create("x", {"train_file": train, "test_file": test})
    assert [game.observation for game in asked(environment).values()] == ["One?"]


def test_an_id_is_the_questions_own_or_a_hash_of_it(tmp_path: Path) -> None:
    question = {"question": "How much?", "answer": 1}
    environment = of_file(tmp_path / "x", question, question, {"id": "mine", "question": "Which?", "answer": 2})
    # Pinned: a task must stay what it was when results were published.
    assert list(asked(environment, Split.TEST)) == ["test/4560a4b62a4631003786dcfd", "test/mine"]


@pytest.mark.parametrize("task_id", ["", "train", "train/", "train/none", "test/number-01", "dev/number-01"])
def test_unknown_tasks(sample: Questions, task_id: str) -> None:
    for start in (sample.start, lambda id_: sample.start_unanswerable(id_, FROM_DATA)):
        with pytest.raises(UnknownTask):
            start(task_id)


# Errors


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"question": "x?", "anser": 1}, "anser: no such field; did you mean 'answer'?"),
        ({"question": "x?"}, "answer: is missing; expected `answer` with `question`"),
        ({"answer": 1}, "question: is missing; expected `question` with `answer`, or `unanswerable`"),
        ({"question": " ", "answer": 1}, "question: expected a text that is not empty"),
        ({"question": 5, "answer": 1}, "question: expected a text that is not empty"),
        ({"question": "x?", "answer": {}}, "answer: expected a text, a number or a list of these"),
        ({"question": "x?", "answer": True}, "answer: expected a text, a number or a list of these"),
        ({"question": "x?", "answer": []}, "answer: expected a text, a number or a list of these"),
        ({"question": "x?", "answer": ""}, "answer: expected no empty text"),
        ({"question": "x?", "answer": "A", "choices": ["a"]}, "choices: expected two or more that differ"),
        ({"question": "x?", "answer": "A", "choices": ["a b", "A, b"]}, "choices: expected two or more that differ"),
        (
            {"question": "x?", "answer": "bea", "choices": ["ant", "bee"]},
            "answer: expected a letter from A to B or a choice, not 'bea'; did you mean 'bee'?",
        ),
        ({"question": "x?", "answer": "C", "choices": ["ant", "bee"]}, "answer: expected a letter from A to B or"),
        ({"question": "x?", "answer": 1, "id": "x" * 181}, "id: expected 1 to 180 characters, not 181"),
        ({"question": "x?", "answer": 1, "id": "first"}, "id: 'first' is also the id of"),
        ([1], "Expected `object`, got `array`"),
    ],
)
def test_a_bad_line_is_named_with_what_was_expected(tmp_path: Path, record: object, said: str) -> None:
    good = {"question": "y?", "answer": 1, "id": "first"}
    with pytest.raises(ValueError, match="^" + re.escape(f"{tmp_path}/some.jsonl:2: {said}")):
        of_file(tmp_path / "some.jsonl", good, record)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"format": "sums", "train_file": "x"}, "format must be one of questions, sum, steer-bench, not 'sums'"),
        ({"format": "sum"}, "needs a train_file or a test_file"),
        ({"steering": "both"}, "steering is for"),
        ({"train_tasks": -1}, "train_tasks must be at least 0"),
        ({"train_file": "/none/x.jsonl"}, "train_file: no such file: /none/x.jsonl"),
        ({"trainfile": "x"}, "trainfile: no such setting; did you mean 'train_file'?"),
    ],
)
def test_a_bad_setting_is_named(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        create("x", settings)


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no questions in it"):
        of_file(tmp_path / "x")


# SUM

PAIR = {"answerable_question": "1 + 1?", "unanswerable_question": "1 + some?", "ground_truth": "2"}
REFUSED = {"ground_truth": "I don't know."}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_sums_pairs_are_questions_with_an_unanswerable_version(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    if suffix == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist([PAIR]), path)
    else:
        write(path, PAIR)
    environment: Questions = create("x", {"test_file": str(path), "format": "sum"})
    ((task_id, game),) = asked(environment, Split.TEST).items()
    assert (game.observation, game.step("\\boxed{2}").reward) == ("1 + 1?", 1.0)
    assert environment.start_unanswerable(task_id, FROM_DATA).observation == "1 + some?"


@pytest.mark.parametrize("prompt", ["1 + some? Think first.", [{"role": "user", "content": "1 + some? Think first."}]])
def test_sums_test_file_takes_refusals_and_its_questions_are_not_for_training(tmp_path: Path, prompt: object) -> None:
    other = {**PAIR, "answerable_question": "3 + 1?", "unanswerable_question": "3 + a bit?"}
    train = write(tmp_path / "train", PAIR, other)
    test = write(tmp_path / "test", {"prompt": prompt, **REFUSED})
    environment: Questions = create("x", {"train_file": train, "test_file": test, "format": "sum"})
    assert [game.observation for game in asked(environment).values()] == ["3 + 1?"]
    ((task_id, game),) = asked(environment, Split.TEST).items()
    assert game.observation == "1 + some? Think first."
    assert environment.versions(Split.TEST, FROM_DATA) == [Versions.UNANSWERABLE]
    assert game.step("\\boxed{I don't know}").reward == 1.0
    assert environment.start(task_id).step("\\boxed{2}").reward == 0.0


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({**REFUSED, "prompt": []}, "prompt: expected a text that is not empty"),
        ({"ground_truth": "4", "prompt": "x"}, "ground_truth: expected \"I don't know.\", as in SUM's test file"),
        (
            {"answerable_question": "x", "unanswerable": "y", "ground_truth": "1"},
            "unanswerable_question: is missing; did you mean 'unanswerable'?; the record has:",
        ),
    ],
)
def test_a_bad_record_of_sum_is_named(tmp_path: Path, record: object, said: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(f"{tmp_path}/x:2: {said}")):
        of_file(tmp_path / "x", PAIR, record, format="sum")


# STEER-BENCH

CHOICES = "  \nA. tea  \nB. coffee  \nC. milk  \nD. juice"


def collected(topic: int, answer_of_one: str, answer_of_other: str) -> dict[str, object]:
    question = f"What is drunk at {topic}?" + CHOICES
    return {
        "subreddit_pair": "early_late",
        "topic": topic,
        "open_ended": {
            "r/A": [{f"When to rise on {topic}?": f"Before {topic}."}, {f"And then on {topic}?": "Run."}],
            "r/B": [{f"When to rise on {topic}?": f"After {topic}."}],
        },
        "closed_ended": {"r/A": [{question: answer_of_one}], "r/B": [{question: answer_of_other}]},
    }


def steered(path: Path, *rows: object, steering: str = "none") -> Questions:
    return of_file(path, *rows, format="steer-bench", steering=steering)


def test_each_community_is_asked_and_has_its_own_answer(tmp_path: Path) -> None:
    environment = steered(tmp_path / "x", collected(1, "A", "B. coffee"))
    games = asked(environment, Split.TEST)
    assert [task_id.split("-")[0] for task_id in games] == ["test/early", "test/late"]
    assert {game.observation for game in games.values()} == {
        "What is drunk at 1?\nA. tea\nB. coffee\nC. milk\nD. juice"
    }
    assert [game.step("B. coffee").reward for game in games.values()] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("label", "right"),
    [
        ("A", "A"),
        ("A.", "A"),
        ("B. A drink", "B"),
        ("A/C", "AC"),
        ("A, C", "AC"),
        ("C/B", "BC"),
        ("A and B; both are mentioned.", "AB"),
        ("A/B/C/D", "ABCD"),
        ("Not discussed", ""),
        ("Doesn't directly say", ""),
        ("A drink", ""),
        ("E", ""),
    ],
)
def test_a_label_may_name_several_letters_or_none(tmp_path: Path, label: str, right: str) -> None:
    environment = steered(tmp_path / "x", collected(1, "A", label))
    late = {task_id for task_id in asked(environment, Split.TEST) if task_id.startswith("test/late")}
    taken = {letter for letter in "ABCD" for task_id in late if environment.start(task_id).step(letter).reward}
    assert taken == set(right)
    assert ("1 without a usable answer left out" in environment.info.description) is (right == "")


@pytest.mark.parametrize(
    ("steering", "shown"),
    [
        ("none", [False, False, False]),
        ("community", [True, False, False]),
        ("examples", [False, True, False]),
        ("both", [True, True, False]),
        ("other_examples", [False, False, True]),
    ],
)
def test_what_is_shown_before_the_question(tmp_path: Path, steering: str, shown: list[bool]) -> None:
    rows = [collected(number, "A", "B") for number in (1, 2)]
    for task_id, game in asked(steered(tmp_path / "x", *rows, steering=steering), Split.TEST).items():
        community = task_id.removeprefix("test/").split("-")[0]
        own, other = ("1", "2") if "drunk at 1?" in game.observation else ("2", "1")
        word = "Before" if community == "early" else "After"
        assert [
            f"r/{community}" in game.observation,
            *(f"{word} {n}." in game.observation for n in (own, other)),
        ] == shown
        assert (", ".join(f"{one} {own}" for one in ("Before", "After") if one != word)) not in game.observation


def test_a_question_may_be_a_task_in_each_context(tmp_path: Path) -> None:
    rows = [collected(number, "A", "Not discussed") for number in (1, 2)]
    whole = steered(tmp_path / "x", *rows, steering="all")
    tasks = [task for split in Split for task in whole.list_tasks(split, 0, 100)]
    assert [task.tags["context"] for task in tasks] == list(STEERING) * 2, "two questions of one community have a label"
    assert {task.task_id.removeprefix(f"{task.split}/") for task in tasks} == {
        f"{task.tags['question']}/{task.tags['context']}" for task in tasks
    }
    assert "2 without a usable answer left out" in whole.info.description
    for steering in STEERING:
        single = steered(tmp_path / "x", *rows, steering=steering)
        for task in (task for split in Split for task in single.list_tasks(split, 0, 100)):
            assert task.tags == {"answerable": "true", "choices": "4"}
            shown = whole.start(f"{task.task_id}/{steering}")
            assert shown.observation == single.start(task.task_id).observation


def test_tags_of_tasks() -> None:
    tags = {task.task_id: task.tags for task in create("x", {}).list_tasks(Split.TEST, 0, 100)}
    assert tags["test/choice-05"] == {"answerable": "true", "choices": "4"}
    assert tags["test/number-05"] == {"answerable": "true"}


def test_ids_and_answers_do_not_depend_on_what_is_shown(tmp_path: Path) -> None:
    rows = [collected(number, "A", "B") for number in (1, 2)]
    plain, told = (steered(tmp_path / "x", *rows, steering=steering) for steering in ("none", "both"))
    assert list(asked(plain, Split.TEST)) == list(asked(told, Split.TEST))


def test_a_question_is_in_one_split_whichever_community_is_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "x", *(collected(number, "A", "B") for number in range(200)))
    environment: Questions = create("x", {"train_file": path, "format": "steer-bench"})
    train, test = ({game.observation for game in asked(environment, split).values()} for split in Split)
    assert len(train) + len(test) == 200 and test and not train & test


def test_evaluation_files_are_read(tmp_path: Path) -> None:
    record = {
        "domain": "drinks",
        "subreddit": "early",
        "closed_ended_question": "What is drunk?" + CHOICES,
        "answer": "C",
        "open_ended": [{"When to rise?": "Before six."}],
    }
    ((_, game),) = asked(steered(tmp_path / "x", record, steering="both"), Split.TEST).items()
    assert "r/early" in game.observation and "Before six." in game.observation
    assert game.step("C").reward == 1.0
    with pytest.raises(ValueError, match=r"x:1: instruction_pair: is missing; steering = 'other_examples' shows it"):
        steered(tmp_path / "x", record, steering="other_examples")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"subreddit_pair": "early"}, "subreddit_pair: expected two names joined by _, not 'early'"),
        ({"closed_ended": {"r/C": []}}, "closed_ended: expected r/A and r/B, not 'r/C'"),
        ({"topic": None}, "topic"),
        ({"closed_ended": [1]}, "closed_ended: Input should be a valid dictionary"),
    ],
)
def test_a_bad_record_of_steer_bench_is_named(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(f"{tmp_path}/x:2: {said}")):
        steered(tmp_path / "x", collected(1, "A", "B"), {**collected(2, "A", "B"), **changes})


@pytest.mark.parametrize(
    ("how", "right", "wrong"),
    [
        ("last_number", "Two times 4: 8 legs", "8, or 9"),
        ("boxed", "9 \\boxed{x = 8}", "8"),
        ("tag", "9 <answer>8 legs</answer>", "\\boxed{8}"),
        ("line", "9\nThe answer is 8.", "8\nyes"),
    ],
)
def test_an_answer_format_is_what_is_read_and_the_prompt_says_so(
    tmp_path: Path, how: str, right: str, wrong: str
) -> None:
    record = {"question": "How many legs have two cows?", "answer": 8, "id": "legs"}
    game = of_file(tmp_path / "q.jsonl", record, answer=how)
    assert game.info.prompts.solver.endswith(AnswerFormat(how).instruction)
    assert game.start("test/legs").step(right).reward == 1
    assert game.start("test/legs").step(wrong).reward == 0
    assert game.start("test/legs").step("").feedback == f"Incorrect. {AnswerFormat(how).missing}"


@pytest.mark.parametrize(
    ("how", "right", "wrong"),
    [
        ("choice", "A cow drinks (B), not (C).\nIt is B, as I said", "(B) or (A)"),
        ("boxed", "(A) \\boxed{B. water}", "B"),
        ("tag", "(A) <answer>water</answer>", "B"),
        ("line", "A\nwater", "B\nno"),
    ],
)
def test_formats_of_multiple_choice(tmp_path: Path, how: str, right: str, wrong: str) -> None:
    record = {"question": "What does a cow drink?", "choices": ["milk", "water"], "answer": "B", "id": "cow"}
    game = of_file(tmp_path / "q.jsonl", record, answer=how)
    assert game.start("test/cow").step(right).reward == 1
    assert game.start("test/cow").step(wrong).reward == 0
