"""The generators of reasoning-gym (https://github.com/open-thought/reasoning-gym) as tasks of one question each.

A task such as `train/chain_sum/00012` is an element of that dataset. Its seed depends on `seed`, split, dataset and
number; train and test never share a seed. The reward is the dataset's own score of the answer, from 0 to 1. The setting
`answer` is what of a reply is read. By default this is the text between <answer> and </answer>, else the last box, else
what it says that "the answer is", else the last number if the expected answer is a number, else the last line.
Questions and scores are made in separate processes; `process.py` says why. These import reasoning_gym when the first
task starts, or at once if there are `settings` to check.

Not all of the 106 datasets are served unchanged:
- `composite` mixes other datasets and is left out, since this environment mixes them itself.
- `game_of_life_halting` scores any answer as right; here it must be the expected one.
- Some draw from Python's hash seed or a generator that all share (`codeio`, `isomorphic_strings`,
  `knight_swap`, `list_functions`, `polynomial_multiplication`, `ransom_note`, `word_ladder`); these have fixed seeds.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

from mulligan.env.answers import AnswerFormat, read_answer
from mulligan.env.base import (
    EnvironmentInfo,
    Faulted,
    MissingExtra,
    Split,
    StepResult,
    TaskInfo,
    UnknownTask,
)
from mulligan.env.envs.reasoning_gym.pool import SIZE, DatasetError, DatasetPool, TookTooLong
from mulligan.env.numbered import MAX_TASKS
from mulligan.env.prompts import generic_prompts
from mulligan.env.tool_calls import printable

OVER = "The episode is over."
INVALID = "invalid"
_SEEDS = 2**30  # of a split
_MAX_ANSWER = 20_000  # characters
_SHOWN = 200
_TRIED = 3  # tasks of a dataset whose right answers are read, to see that the format can read them

# Kept here, as importing reasoning_gym takes seconds; a test compares.
DATASETS = tuple(
    """
ab acre advanced_geometry aiw arc_1d arc_agi base_conversion basic_arithmetic bf binary_alternation binary_matrix
bitwise_arithmetic boxnet caesar_cipher calendar_arithmetic chain_sum circuit_logic codeio coin_flip
color_cube_rotation complex_arithmetic count_bits count_primes countdown course_schedule cryptarithm
decimal_arithmetic decimal_chain_sum dice emoji_mystery family_relationships figlet_font fraction_simplification
futoshiki game_of_life game_of_life_halting gcd graph_color group_anagrams gsm_symbolic intermediate_integration
isomorphic_strings jugs kakurasu knight_swap knights_knaves largest_island lcm leg_counting letter_counting
letter_jumble list_functions mahjong_puzzle manipulate_matrix maze mini_sudoku modulo_grid n_queens needle_haystack
number_filtering number_format number_sequence number_sorting palindrome_generation palindrome_partitioning path_star
polynomial_equations polynomial_multiplication pool_matrix power_function prime_factorization products
propositional_logic puzzle24 quantum_lock ransom_note rearc rectangle_count rotate_matrix rotten_oranges rubiks_cube
rush_hour self_reference sentence_reordering shortest_path simple_equations simple_geometry simple_integration sokoban
spell_backward spiral_matrix string_insertion string_manipulation string_splitting string_synthesis sudoku survo
syllogism time_intervals tower_of_hanoi tsumego word_ladder word_sequence_reversal word_sorting zebra_puzzles
""".split()  # noqa: SIM905 - not a name a line
)


@dataclass(frozen=True, slots=True)
class Settings:
    """`datasets` defaults to all. `settings` has a table for each dataset whose settings differ from its defaults.
    `train_tasks` and `test_tasks` count the tasks of each dataset. `answer` is what of a reply is read, which the
    prompt says. With `tell_answer`, full feedback includes the expected answer. `processes` is how many processes make
    questions and score answers. `seconds` and the memory limit hold for each question or score."""

    datasets: tuple[str, ...] = ()
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    train_tasks: int = 1_000
    test_tasks: int = 10
    seed: int = 0
    answer: AnswerFormat = AnswerFormat.AUTO
    tell_answer: bool = False
    processes: int = 1
    seconds: int = 30
    memory_mb: int = 4_096
    name: str = "reasoning_gym"

    def __post_init__(self) -> None:
        for setting, number, least, most in (
            ("train_tasks", self.train_tasks, 0, MAX_TASKS),
            ("test_tasks", self.test_tasks, 0, MAX_TASKS),
            ("processes", self.processes, 1, 64),
            ("seconds", self.seconds, 1, 3_600),
            ("memory_mb", self.memory_mb, 1_024, 2**20),
        ):
            if not least <= number <= most:
                raise ValueError(f"{setting} must be between {least} and {most}, not {number}")
        served = self.datasets or DATASETS
        for setting, names in (("datasets", self.datasets), ("settings", self.settings)):
            if unknown := [name for name in names if name not in DATASETS]:
                raise ValueError(f"{setting}: there is no dataset {unknown[0]!r}; there are: {', '.join(DATASETS)}")
        if len(set(served)) < len(served):
            raise ValueError(f"datasets must differ, not {', '.join(served)}")
        for name, table in self.settings.items():
            if name not in served:
                raise ValueError(f"settings.{name}: {name!r} is not among datasets")
            if taken := {"seed", "size"} & set(table):
                raise ValueError(f"settings.{name}.{min(taken)}: the tasks decide it")


class ReasoningGymEpisode:
    """`expected` is the dataset's own answer; empty if several answers are right."""

    def __init__(self, question: str, expected: str, task: Mapping[str, Any], game: ReasoningGym) -> None:
        self.observation = question
        self.expected = expected
        self.task = task
        self._game = game

    def step(self, action: str) -> StepResult:
        how = self._game.settings.answer
        answer = read_answer(action, self.expected, how)
        if not answer:
            return self._result(INVALID, 0.0, how.missing, "")
        shown = printable(answer, _SHOWN)
        read = f" Answer read: {shown}."
        if len(answer) > _MAX_ANSWER:
            return self._result(shown, 0.0, "Incorrect.", f"{read} It is longer than {_MAX_ANSWER} characters.")
        try:
            score = self._game.score(self.task, answer)
        except TookTooLong as error:
            return self._result(shown, 0.0, "Incorrect.", f"{read} It could not be scored: {error}.")
        verdict = "Correct." if score >= 1 else "Partly correct." if score > 0 else "Incorrect."
        return self._result(shown, score, verdict, read)

    def fork(self) -> ReasoningGymEpisode:
        return copy(self)  # nothing in it changes

    def _result(self, reading: str, score: float, verdict: str, read: str) -> StepResult:
        tell = self._game.settings.tell_answer and score < 1 and self.expected
        expected = f" Expected: {self.expected}" if tell else ""
        return StepResult(OVER, reading, score, done=True, feedback=f"{verdict} Score {score:.2f}.{read}{expected}")


class ReasoningGym:
    """Lists tasks of all datasets in turn."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._datasets = settings.datasets or DATASETS
        self._counts = {Split.TRAIN: settings.train_tasks, Split.TEST: settings.test_tasks}
        self._pool = DatasetPool(settings.processes, settings.seconds, settings.memory_mb * 2**20, settings.settings)
        what = self._datasets[0] if len(self._datasets) == 1 else f"{len(self._datasets)} datasets"
        self.info = EnvironmentInfo(
            name=settings.name,
            description=f"Questions of reasoning-gym: {what}",
            prompts=generic_prompts(_TASK, settings.answer.instruction or _FORMAT),
            max_steps=1,
            max_reward=1.0,
            deterministic=True,
            task_counts={split: count * len(self._datasets) for split, count in self._counts.items()},
            can_fork=True,
        )

    def check(self) -> None:
        """Raises ValueError if a dataset's settings are wrong, or its right answers cannot be read. It names the
        dataset."""
        for name in self.settings.settings:
            try:
                self._pool.ask({"do": "check", "name": name})
            except DatasetError as error:
                raise ValueError(f"settings.{name}: {error}") from error
        for name in self._datasets if self.settings.answer is not AnswerFormat.AUTO else ():
            if unread := self._unread(name):
                raise ValueError(
                    f'answer: expected a format that reads the answers of {name}, such as "auto"; '
                    f'"{self.settings.answer}" reads {self.settings.answer.read}, and the answer to {unread[0]} is '
                    f"{printable(unread[1], _SHOWN)!r}"
                )

    def _unread(self, name: str) -> tuple[str, str] | None:
        """A task of the dataset and its right answer, if no right answer of a few tasks counts in the format. None also
        where that cannot be found out."""
        how = self.settings.answer
        split = Split.TRAIN if self.settings.train_tasks else Split.TEST
        found = None
        try:
            for index in range(min(_TRIED, self._counts[split])):
                episode = self.start(f"{split}/{name}/{index:05d}")
                right = episode.expected
                read = read_answer(how.written(right), right, how)
                if not right or (read and self.score(episode.task, read) >= 1):
                    return None
                if found is None and self.score(episode.task, right) >= 1:
                    found = f"{split}/{name}/{index:05d}", right
        except (DatasetError, Faulted, TookTooLong):  # a task that is played says so
            return None
        return found

    def list_tasks(self, split: Split, offset: int, limit: int) -> Sequence[TaskInfo]:
        """All tasks have difficulty 1: the datasets define difficulty by ranges of parameters, not as a number."""
        first = max(offset, 0)
        last = min(self.info.task_counts[split], first + max(limit, 0))
        places = (divmod(at, len(self._datasets)) for at in range(first, last))
        return [TaskInfo(f"{split}/{self._datasets[which]}/{index:05d}", split, 1.0) for index, which in places]

    def start(self, task_id: str) -> ReasoningGymEpisode:
        split, _, rest = task_id.partition("/")
        name, _, digits = rest.partition("/")
        well_formed = split in tuple(Split) and len(digits) == 5 and digits.isascii() and digits.isdigit()
        if not well_formed or name not in self._datasets or int(digits) >= self._counts[Split(split)]:
            raise UnknownTask(f"{task_id[:80]!r} is not a task of {self.info.name}")
        part, index = divmod(int(digits), SIZE)
        task = {"name": name, "seed": self._seed(Split(split), name, part), "index": index}
        made = self._pool.ask({"do": "question", **task})
        return ReasoningGymEpisode(made["question"], made["answer"] or "", task, self)

    def score(self, task: Mapping[str, Any], answer: str) -> float:
        return float(self._pool.ask({"do": "score", **task, "answer": answer}))

    def close(self) -> None:
        self._pool.close()

    def _seed(self, split: Split, name: str, part: int) -> int:
        digest = hashlib.sha256(f"{self.settings.seed}/{split}/{name}/{part}".encode()).digest()
        drawn = int.from_bytes(digest[:8]) % (_SEEDS - SIZE)  # most datasets draw an element from seed + index
        return drawn + (0 if split is Split.TRAIN else _SEEDS)


def create(name: str, settings: Settings) -> ReasoningGym:
    """Raises MissingExtra, and ValueError that names the setting."""
    settings = replace(settings, name=name)
    if importlib.util.find_spec("reasoning_gym") is None:
        raise MissingExtra("reasoning-gym", ModuleNotFoundError("No module named 'reasoning_gym'"))
    game = ReasoningGym(settings)
    try:
        game.check()
    except BaseException:
        game.close()
        raise
    return game


_TASK = "Answer a question."
_FORMAT = """\
Think first. Then give your final answer, and nothing else, between <answer> and </answer>. Without these marks your \
last box is read, else what you say that "the answer is", else your last number or line. Where the question has an \
example, keep strictly to its format. You have one attempt at it."""
