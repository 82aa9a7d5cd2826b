"""The adapter for reasoning-gym: every generator, the same in each process, and answers that are no good."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mulligan.env.answers import AnswerFormat
from mulligan.env.base import Faulted, Split, UnknownTask
from mulligan.env.envs.reasoning_gym.environment import DATASETS, INVALID, OVER, ReasoningGym
from mulligan.env.envs.reasoning_gym.pool import SIZE, DatasetPool, TookTooLong
from mulligan.env.envs.reasoning_gym.process import Datasets, is_formula
from mulligan.env.load import load
from tests.support.kinds import creator

create = creator("reasoning_gym")

# They have no single answer. Where one is given as an example, `test_examples…` takes it.
NO_EXPECTED_ANSWER = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
NONSENSE = "zzz nonsense \N{ICE CUBE}"


@pytest.fixture(scope="module")
def game() -> Iterator[ReasoningGym]:
    made = create("reasoning-gym", {"tell_answer": True})
    yield made
    made.close()


@pytest.fixture(scope="module")
def other() -> Iterator[ReasoningGym]:
    """With a process of its own."""
    made = create("reasoning-gym", {})
    yield made
    made.close()


@pytest.mark.long
@pytest.mark.timeout(300)
def test_every_generator_makes_the_same_task_in_each_process_and_knows_its_answer(
    game: ReasoningGym, other: ReasoningGym
) -> None:
    tasks = [task.task_id for task in game.list_tasks(Split.TRAIN, 0, len(DATASETS))]
    assert [task_id.split("/")[1] for task_id in tasks] == list(DATASETS)
    with ThreadPoolExecutor(2) as threads:
        here = threads.submit(lambda: {task_id: game.start(task_id) for task_id in tasks})
        there = threads.submit(lambda: {task_id: other.start(task_id) for task_id in reversed(tasks)})
        started = here.result()
        again = there.result()
    without_answer = set()
    for task_id, episode in started.items():
        assert episode.observation and episode.observation == again[task_id].observation, task_id
        assert episode.expected == again[task_id].expected, task_id
        nonsense = episode.fork().step(f"<answer>{NONSENSE}</answer>")
        assert 0.0 <= nonsense.reward < 0.5 and nonsense.action == NONSENSE, task_id
        if not episode.expected:
            without_answer.add(task_id.split("/")[1])
            continue
        right = episode.step(f"I think so.\n<answer>{episode.expected}</answer>")
        assert (right.reward, right.done, right.truncated) == (1.0, True, False), task_id
        assert right.feedback.startswith("Correct. Score 1.00. Answer read: ")
    assert without_answer == NO_EXPECTED_ANSWER


NUMBER = re.compile(r"[-+]?[0-9]*[.]?[0-9]+([eE][-+]?[0-9]+)?|-?[0-9]+/[0-9]+")


def sentences(answer: str) -> list[str]:
    """In which an agent may say it."""
    said = [
        f"I think so.\n\n<answer>{answer}</answer>\nThat is my answer.",
        f"<think>zzz</think><answer>{answer}</answer>",
    ]
    if "\n" not in answer and answer == answer.strip(" *_"):
        end = "" if answer.endswith(".") else "."
        said += [f"I think so.\nThe answer is {answer}{end}", f"**Answer:** {answer}", f"The final answer is: {answer}"]
        said += [f"I think so.\n**Answer**: {answer}", f"The answer is {answer}{end}\n\nHope that helps!"]
        said += [
            f"I think so.\n{answer}{end}",
            f"I think so.\n<answer>{answer}",
            f"The answer is:\n```\n{answer}\n```\nYes.",
        ]
        if not end:
            said += [f"I think so.\n**{answer}**"]
        else:
            said += [f"I think so.\n**{answer}**.", f"I think so.\nSo it is {answer}."]
        if "=" not in answer:
            said += [f"So x = {answer}"]
    if answer.count("{") == answer.count("}") and "\\text" not in answer:
        said.append(f"So it is $\\boxed{{{answer}}}$.")
    if NUMBER.fullmatch(answer):
        said += [
            f"It is 3, I mean {answer} metres.",
            f"9 - 1 = {answer}",
            f"12 of 3, so **{answer}**",
            f"The answer is {answer}. I took 2 steps.",
            f"So the answer is 7 - 2 = {answer}.\nI took 2 steps.",
        ]
    return said


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", [name for name in DATASETS if name not in NO_EXPECTED_ANSWER])
def test_the_right_answer_in_a_sentence_scores_1_and_a_wrong_one_does_not(game: ReasoningGym, name: str) -> None:
    for number in (0, 1):
        episode = game.start(f"test/{name}/{number:05d}")
        answer = episode.expected
        for said in sentences(answer):
            step = episode.fork().step(said)
            assert step.reward == 1.0, (said, step.action)
        wrong = re.sub("[0-9]", r"9\g<0>", answer, count=1) if NUMBER.fullmatch(answer) else NONSENSE
        for said in sentences(wrong):
            step = episode.fork().step(said)
            assert step.reward < 1.0, (said, step.action)
        for said in (f"<think>The answer is {answer}", f"<think><answer>{answer}</answer>", f"{answer}</think>"):
            assert episode.fork().step(said).action == INVALID


def test_examples_are_right_where_there_is_no_expected_answer(game: ReasoningGym) -> None:
    examples: dict[str, Callable[[Any], str]] = {
        "graph_color": lambda known: json.dumps(known["possible_answer"]),
        "propositional_logic": lambda known: known["example_answer"],
        "rubiks_cube": lambda known: known["example_correct_answer"],
    }
    datasets = Datasets({})
    for name, read in examples.items():
        seed = game._seed(Split.TEST, name, 0)
        answer = read(datasets.entry(name, seed, 4)["metadata"])
        assert game.start(f"test/{name}/00004").step(f"<answer>{answer}</answer>").reward == 1.0, name


def test_the_names_are_those_of_the_package() -> None:
    from reasoning_gym.factory import DATASETS as INSTALLED

    assert set(INSTALLED) == {*DATASETS, "composite"}


def test_a_task_depends_on_its_id_alone(game: ReasoningGym, other: ReasoningGym) -> None:
    """Those that draw from generators which all share, after other histories; numbers beyond a dataset's size."""
    for name in ("list_functions", "codeio", "acre", "gsm_symbolic"):
        for number in (0, 7, SIZE - 1):
            task_id = f"train/{name}/{number:05d}"
            game.start(f"train/{name}/{(number + 3) % SIZE:05d}")
            assert game.start(task_id).observation == other.start(task_id).observation, task_id
    large = create("large", {"datasets": ["chain_sum"], "train_tasks": 3 * SIZE})
    questions = {large.start(f"train/chain_sum/{number:05d}").observation for number in (5, SIZE + 5, 2 * SIZE + 5)}
    assert len(questions) == 3
    large.close()


def test_splits_and_seeds_share_no_seed() -> None:
    games = [ReasoningGym(create("x", {"seed": seed}).settings) for seed in (0, 1)]
    seeds = [game._seed(split, name, 0) for game in games for split in Split for name in DATASETS]
    assert len(set(seeds)) == len(seeds)
    train, test = ([game._seed(split, name, 9) for game in games for name in DATASETS] for split in Split)
    assert max(train) + SIZE <= 2**30 <= min(test) and max(test) + SIZE <= 2**31


def test_tasks_are_of_all_datasets_in_turn() -> None:
    game = create("x", {"datasets": ["gcd", "lcm"], "train_tasks": 2, "test_tasks": 1})
    assert [task.task_id for task in game.list_tasks(Split.TRAIN, 0, 10**9)] == [
        *("train/gcd/00000", "train/lcm/00000", "train/gcd/00001", "train/lcm/00001")
    ]
    assert [task.task_id for task in game.list_tasks(Split.TRAIN, 1, 2)] == ["train/lcm/00000", "train/gcd/00001"]
    assert game.info.task_counts == {Split.TRAIN: 4, Split.TEST: 2}
    for task_id in ("train/gcd/00002", "test/lcm/00001", "train/ab/00000", "train/gcd", "gcd/00000", "dev/gcd/00000"):
        with pytest.raises(UnknownTask):
            game.start(task_id)


def test_feedback_tells_the_score_what_was_read_and_the_answer_if_that_is_set(
    game: ReasoningGym, other: ReasoningGym
) -> None:
    task_id = "train/chain_sum/00012"
    expected = game.start(task_id).expected
    wrong = str(int(expected) + 1_000_003)
    told = game.start(task_id).step(wrong)
    assert (told.observation, told.action, told.reward) == (OVER, wrong, 0.0)
    assert told.feedback == f"Incorrect. Score 0.00. Answer read: {wrong}. Expected: {expected}"
    assert other.start(task_id).step(wrong).feedback == f"Incorrect. Score 0.00. Answer read: {wrong}."
    nothing = other.start(task_id).step(" ")
    assert (nothing.action, nothing.reward, nothing.feedback) == (INVALID, 0.0, "No answer was found. Score 0.00.")
    assert other.start(task_id).step(f"<answer>it is {expected}</answer>").reward == 1.0
    words = other.start("train/word_sorting/00012")
    partly = words.step(f"<answer>it is {words.expected}</answer>")
    assert 0 < partly.reward < 1 and partly.feedback.startswith("Partly correct. Score 0.")
    long = other.start(task_id).step("9" * 30_000)
    assert long.reward == 0.0 and long.feedback.endswith("It is longer than 20000 characters.")


@pytest.mark.parametrize(
    ("answer", "unread", "why"),
    [
        ("last_number", "spell_backward", "reads the last number, and the answer to train/spell_backward/00000 is"),
        ("choice", "chain_sum", "reads the last letter that stands alone, and the answer to train/chain_sum/00000 is"),
        ("line", "mini_sudoku", "reads the last line, and the answer to train/mini_sudoku/00000 is"),
    ],
)
def test_a_format_that_cannot_read_the_answers_is_refused(answer: str, unread: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"answer: expected a format that reads the answers of {unread}.*{why}"):
        create("x", {"datasets": ["gcd", unread] if answer != "choice" else [unread], "answer": answer})
    for read in (AnswerFormat.AUTO, AnswerFormat.TAG, AnswerFormat.BOXED):
        create("x", {"datasets": [unread], "answer": read}).close()


def test_answers_are_never_run_as_code(other: ReasoningGym, tmp_path: Any) -> None:
    """These datasets hand an answer to `eval` or to sympy's parser."""
    mark = tmp_path / "was-here"
    codes = (f"open({str(mark)!r}, 'w')", f"__import__('pathlib').Path({str(mark)!r}).touch()", f"exec('{mark}')")
    evaluating = ("string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "number_sorting")
    parsing = ("countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration")
    for name in (*evaluating, *parsing):
        for code in codes:
            assert other.start(f"train/{name}/00000").step(f"<answer>{code}</answer>").reward < 0.5, name
    assert not mark.exists()
    matrix = other.start("train/spiral_matrix/00000")
    assert matrix.step(f"<answer>[{', '.join(matrix.expected.split())}]</answer>").reward > 0, "a literal is read"


def test_formulas_have_numbers_operators_and_functions() -> None:
    for formula in ("3*x**2 + 2*x - C", "sin(x)/2 - log(3*X)", "(8 - 2)*4", "24", "1.5e3*x", "sqrt(2)*atan(x)"):
        assert is_formula(formula), formula
    for code in ("x.__class__", "open(1)", "eval(x)", "().real", "x;y", "'x'", "[x]", "lambda x: x", "_", "exit()"):
        assert not is_formula(code), code


def test_an_answer_that_takes_too_long_scores_nothing_and_the_next_is_scored() -> None:
    game = create("x", {"datasets": ["puzzle24"], "seconds": 2, "train_tasks": 5})
    episode = game.start("train/puzzle24/00000")
    slow = episode.fork().step("<answer>9**9**9</answer>")
    assert (slow.reward, slow.done) == (0.0, True)
    assert slow.feedback.endswith("Answer read: 9**9**9. It could not be scored: it took longer than 2 s.")
    assert episode.step(f"<answer>{episode.expected}</answer>").reward == 1.0
    game.close()
    with pytest.raises(Faulted, match="closed"):
        game.start("train/puzzle24/00001")


def test_a_process_that_is_killed_or_takes_too_long_fails_one_request() -> None:
    pool = DatasetPool(1, 1, 2**32, {})
    pool.ask({"do": "check", "name": "gcd"})
    (process,) = pool._all
    os.kill(process._process.pid, signal.SIGSTOP)
    timer = threading.Timer(0.2, lambda: os.kill(process._process.pid, signal.SIGKILL))
    timer.start()
    with pytest.raises(Faulted, match="ended with status -9"):
        pool.ask({"do": "check", "name": "gcd"})
    pool.ask({"do": "check", "name": "gcd"})
    (process,) = pool._all
    os.kill(process._process.pid, signal.SIGALRM)  # what the kernel sends at the limit
    with pytest.raises(TookTooLong, match="longer than 1 s"):
        pool.ask({"do": "check", "name": "gcd"})
    pool.close()
    with pytest.raises(Faulted, match="closed"):
        pool.ask({"do": "check", "name": "gcd"})


def test_a_process_ends_with_its_server() -> None:
    pool = DatasetPool(1, 30, 2**32, {})
    pool.ask({"do": "check", "name": "gcd"})
    (process,) = pool._all
    assert process._process.stdin is not None
    process._process.stdin.close()  # as the kernel does when the server is killed
    deadline = time.monotonic() + 30
    while process._process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process._process.returncode == 0


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ({"datasets": ["chain_sums"]}, "datasets: there is no dataset 'chain_sums'; there are: ab, acre"),
        ({"datasets": ["composite"]}, "datasets: there is no dataset 'composite'"),
        ({"datasets": ["gcd", "gcd"]}, "datasets must differ"),
        ({"datasets": ["gcd"], "settings": {"lcm": {}}}, "settings.lcm: 'lcm' is not among datasets"),
        ({"settings": {"gcd": {"size": 5}}}, "settings.gcd.size: the tasks decide it"),
        ({"settings": {"gcd": {"colour": 5}}}, "settings.gcd: TypeError: .*'colour'"),
        ({"settings": {"gcd": {"min_numbers": 9}}}, "settings.gcd: AssertionError: max_numbers must be"),
        ({"train_tasks": 100_000}, "train_tasks must be between 0 and 99999"),
        ({"processes": 0}, "processes must be between 1 and 64"),
    ],
)
def test_bad_settings_are_named(table: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=rf"environments\.game: (Value error, )?{problem}"):
        load("game", {"kind": "reasoning_gym", **table})


def test_settings_of_a_dataset_are_used() -> None:
    table = {"min_terms": 9, "max_terms": 9, "min_digits": 1, "max_digits": 1}
    game = create("x", {"datasets": ["chain_sum"], "settings": {"chain_sum": table}})
    question = game.start("test/chain_sum/00003").observation
    assert question.count("+") + question.count("-") == 8
    (process,) = game._pool._all
    game.close()
    assert process._process.poll() is not None


@pytest.mark.parametrize(
    ("how", "frame", "missed"),
    [
        ("last_number", "That makes {}.", "none"),
        ("tag", "so <answer>{}</answer> it is", "{}"),
        ("boxed", "so \\boxed{{{}}} it is", "<answer>{}</answer>"),
        ("line", "Let me see.\nThe answer is {}.", ""),
    ],
)
def test_an_answer_format_is_what_is_read_and_the_prompt_says_so(how: str, frame: str, missed: str) -> None:
    game = create("sums", {"datasets": ["chain_sum"], "answer": how, "train_tasks": 3})
    try:
        assert game.info.prompts.solver.endswith(AnswerFormat(how).instruction)
        for task in game.list_tasks(Split.TRAIN, 0, 3):
            right = game.start(task.task_id).expected
            assert game.start(task.task_id).step(frame.format(right)).reward == 1
            none = game.start(task.task_id).step(missed.format(right))
            assert (none.reward, none.action) == (0, INVALID)
            assert none.feedback.startswith(AnswerFormat(how).missing)
    finally:
        game.close()
