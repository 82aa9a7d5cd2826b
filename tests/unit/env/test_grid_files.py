"""Levels of Sokoban and maps of FrozenLake that people have."""

from __future__ import annotations

import json
import re
import tomllib
from contextlib import suppress
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mulligan.env.base import Environment, Split, UnknownTask
from mulligan.env.config import EnvSettings
from mulligan.env.envs.sokoban.boards import SokobanBoard
from mulligan.env.envs.sokoban.levels import read_levels
from tests.support.effort import examples
from tests.support.kinds import creator
from tests.support.paths import ROOT

BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "docs/environments.md").read_text(), re.MULTILINE | re.DOTALL)
BOXOBAN = """\
; 0
##########
##########
#. # #####
#  $   ###
#    $$ ##
# $ @. .##
#.     ###
##########
##########
##########

; 1
##########
#.$@######
##########
##########
##########
##########
##########
##########
##########
##########
"""
EXPECTED = ("EEEEE", "EABCE", "EEEEE")


def play(environment: Environment, task_id: str, *moves: str) -> float:
    episode = environment.start(task_id)
    results = [episode.step(f"```{move}```") for move in moves]
    assert not any(result.done for result in results[:-1])
    return results[-1].reward


def ids(environment: Environment, split: Split = Split.TEST) -> list[str]:
    return [task.task_id for task in environment.list_tasks(split, 0, 10_000)]


def write(path: Path, text: str) -> str:
    path.write_text(text, newline="")
    return str(path)


def levels(path: Path, text: str) -> list[SokobanBoard]:
    return [placed.board for placed in read_levels(Path(write(path, text)))]


def test_the_examples_of_the_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files in it are what the configuration beside them names."""
    files = {match[1]: text for _, text in BLOCKS if (match := re.match(r"[;#] (\S+\.(?:xsb|txt))\n", text))}
    (example,) = [text for kind, text in BLOCKS if kind == "toml" and "levels.xsb" in text]
    assert set(files) == {"levels.xsb", "maps.txt"}
    for name, text in files.items():
        assert len(text.splitlines()) <= 12
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    made = EnvSettings(environments=tomllib.loads(example)["environments"]).create_environments()
    first, second = ids(made["my-sokoban"])
    assert play(made["my-sokoban"], first, "Right") == play(made["my-sokoban"], second, "Right", "Right") == 1.0
    assert [task.difficulty for task in made["my-sokoban"].list_tasks(Split.TEST, 0, 9)] == [1.0, 2.0]
    assert ids(made["my-sokoban"], Split.TRAIN) == []
    (lake,) = ids(made["my-lake"])
    assert play(made["my-lake"], lake, "Down", "Down", "Right", "Right", "Right") == 1.0
    assert made["my-lake"].list_tasks(Split.TEST, 0, 1)[0].difficulty == 5.0


def test_the_document_s_two_records_of_hotpotqa_are_the_same_task(tmp_path: Path) -> None:
    (example,) = [text for kind, text in BLOCKS if kind == "json" and "sentences" in text]
    seen = []
    for line in example.splitlines():
        world = creator("hotpotqa")("x", {"test_file": write(tmp_path / "file.jsonl", line)})
        (task,) = world.list_tasks(Split.TEST, 0, 9)
        game = world.start(task.task_id)
        call = '<tool_call>{"name": "local_search", "arguments": {"query": "Vell"}}</tool_call>'
        seen.append((task, game.observation, game.step(call).observation, game.step(r"\boxed{Sorn}").reward))
    assert seen[0] == seen[1] and seen[0][0].task_id == "test/5a7a0693" and seen[0][3] == 1.0


def test_a_file_of_boxoban(tmp_path: Path) -> None:
    path = write(tmp_path / "000.txt", BOXOBAN)
    game = creator("sokoban")("x", {"train_file": path, "test_file": path, "max_steps": 200})
    tasks = game.list_tasks(Split.TEST, 0, 9)
    assert game.info.task_counts == {Split.TRAIN: 0, Split.TEST: 2}
    rows = BOXOBAN.splitlines()[1:11]
    canonical = dict(zip("#@$. ", "EABCD", strict=True))
    shown = ["".join(canonical[letter] for letter in row) for row in rows]
    assert game.start(tasks[0].task_id).observation.replace("\t", "").splitlines() == shown
    assert "at most 200 moves" in game.info.prompts.solver


@pytest.mark.parametrize(
    "text",
    [
        "#####\n#@$.#\n#####",
        "\ufeff; 1\r\n\r\n#####\r\n#@$.#\r\n#####\r\nTitle: one\r\n",
        "Some words\n   #####\n   #@$.#\n   #####\n; after",
        "#####--\n#@$.#__\n#####  ",
        "5#|#@$.#|5#",
        "::a\n5#|#@$.#|5#|\n",
    ],
)
def test_one_level_in_many_ways_is_one_task(tmp_path: Path, text: str) -> None:
    assert [board.rows for board in levels(tmp_path / "a.xsb", text)] == [EXPECTED]


def test_what_lies_outside_the_walls_is_wall(tmp_path: Path) -> None:
    (board,) = levels(tmp_path / "a.xsb", " ######\n##    #\n#+ $ *#\n#-_####\n####")
    assert board.rows == ("EEEEEEE", "EEDDDDE", "EaDBDbE", "EDDEEEE", "EEEEEEE")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no board in it"),
        ("Only words\nand more\n", "no board in it"),
        ("\n#####\n#x$.#\n#####", r"a\.xsb:3: 'x' in a row of a level; expected # \(wall\)"),
        ("; 1\n#####\n#@$.#\n#####\n\n; 2\n#####\n#@$@#\n#####", r"a\.xsb:7: 2 players in this level; expected one"),
        ("#####\n# $.#\n#####", r"a\.xsb:1: 0 players"),
        ("#####\n#@$ #\n#####", r"a\.xsb:1: 1 boxes and 0 goals"),
        ("#####\n#@  #\n#####", r"a\.xsb:1: 0 boxes and 0 goals"),
        ("#####\n#@$.\n#####", r"a\.xsb:1: the walls have a gap: "),
        ("#####\n#@*##\n#####", r"a\.xsb:1: this level is solved already"),
        ("######\n#@ .$#\n######", r"a\.xsb:1: this level cannot be won: a box can get to no goal"),
        (
            "########\n#@     #\n#  $$  #\n#  $$  #\n#  ....#\n########",
            "cannot be won in 1,000 moves: every way was tried",
        ),
        ("########\n#@$ $..#\n########", r"a\.xsb:1: this level cannot be won in 1,000 moves"),
        ("#########\n#@      #\n#  $   .#\n#       #\n#########", r"max_steps = 5 .*xsb:1: at least 6;"),
        ("##########\n#@$     .#\n##########", r"1 of 1 boards take more than max_steps = 5 .*xsb:1: at least 6;"),
        ("99#|#@$.#|5#", r"a\.xsb:1: expected each number to be at most 64"),
        ("#" * 65 + "\n#@$." + " " * 60 + "#\n" + "#" * 65, r"a\.xsb:1: 65 x 3 cells; expected at most 64 x 64"),
    ],
)
def test_a_bad_level_is_named_by_file_and_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        creator("sokoban")("x", {"test_file": write(tmp_path / "a.xsb", text), "max_steps": 5})


def test_the_difficulty_is_the_shortest_solution_or_the_pushes_of_a_large_level(tmp_path: Path) -> None:
    small = "######\n#@   #\n# $. #\n#    #\n######\n"
    large = f"{'#' * 22}\n#@{' ' * 19}#\n#{' .$ ' * 5}#\n" + f"#{' ' * 20}#\n" * 9 + f"{'#' * 22}\n"
    path = write(tmp_path / "a.xsb", f"{small}\n{large}")
    tasks = creator("sokoban")("x", {"test_file": path, "max_steps": 1000}).list_tasks(Split.TEST, 0, 9)
    assert [task.difficulty for task in tasks] == [2.0, 5.0]  # Down and Right; five boxes, one push each


MAPS = {"4x4": ["SFFF", "FHFH", "FFFH", "HFFG"], "wide": ["SFG"]}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("maps.json", json.dumps(MAPS)),
        ("maps.JSON", json.dumps(list(MAPS.values()))),
        ("maps.json", json.dumps(["\n".join(rows) + "\n" for rows in MAPS.values()])),
        ("maps.json", json.dumps([list(map(list, rows)) for rows in MAPS.values()])),
        ("maps.toml", '4x4 = """\nSFFF\nFHFH\nFFFH\nHFFG\n"""\nwide = [["S", "F", "G"]]\n'),
        ("maps.toml", '4x4 = ["SFFF", "FHFH", "FFFH", "HFFG"]\nwide = ["SFG"]\n'),
        ("maps.txt", "# Gymnasium's\n\n" + "\n".join(MAPS["4x4"]) + "\r\n; a wide one\n  SFG  \n"),
    ],
)
def test_maps_in_every_format_are_the_same_tasks(tmp_path: Path, name: str, text: str) -> None:
    lake = creator("frozenlake")("x", {"test_file": write(tmp_path / name, text)})
    expected = creator("frozenlake")("x", {"test_file": write(tmp_path / "expected.json", json.dumps(MAPS))})
    assert lake.list_tasks(Split.TEST, 0, 9) == expected.list_tasks(Split.TEST, 0, 9)
    first, second = ids(lake)
    assert lake.start(first).observation.replace("\t", "") == "ADDD\nDCDC\nDDDC\nCDDB"
    assert play(lake, second, "Right", "Right") == 1.0 and play(lake, second, "Up", "Right", "Right") == 1.0
    one = creator("frozenlake")("x", {"test_file": write(tmp_path / "one.json", json.dumps(MAPS["wide"]))})
    assert ids(one) == [second]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("m.txt", "SF\nFX\nFG", r"m\.txt:2: 'X' in a row of a map; expected S \(start\)"),
        ("m.txt", "SF\n\nFG", r"m\.txt:1: 1 starts and 0 goals; expected one S"),
        ("m.txt", "SFF\nFG", r"m\.txt:2: a row of 2 cells; expected 3"),
        ("m.txt", "# none\n", r"m\.txt: no board in it"),
        ("m.txt", "SHG", r"m\.txt:1: there is no way from S to G"),
        ("m.txt", "SFFFFFFFFG", r"max_steps = 8 .*m\.txt:1: at least 9; max_steps must be at least 9"),
        ("m.json", "[", r"m\.json: not JSON: .*line 1"),
        ("m.json", "[[1]]", r"m\.json: map 1: map 1: expected maps"),
        ("m.json", '{"a": ["SG", "F"]}', r"m\.json: a: row 2: a row of 1 cells; expected 2"),
        ("m.toml", 'a = ["SG"]\nb = "SG"', r"m\.toml: b: expected maps"),
        ("m.toml", "a = [", r"m\.toml: not TOML: .*end of document"),
    ],
)
def test_a_bad_map_is_named(tmp_path: Path, name: str, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        creator("frozenlake")("x", {"test_file": write(tmp_path / name, text)})


@pytest.mark.parametrize("kind", ["frozenlake", "sokoban"])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, kind: str) -> None:
    for path in (tmp_path / "none.txt", tmp_path, tmp_path / "*.txt"):
        with pytest.raises(ValueError, match="train_file: no such file"):
            creator(kind)("x", {"train_file": str(path)})


def test_splits_of_one_file_and_of_two(tmp_path: Path) -> None:
    middles = ["".join(letters) for letters in product("FH", repeat=4) if "F" in letters]
    maps = [[first, middle, "FFFG"] for first in ("SFFF", "FSFF") for middle in middles]
    one = write(tmp_path / "one.json", json.dumps(maps + maps[:3]))
    split = creator("frozenlake")("x", {"train_file": one})
    train, test = (set(ids(split, each)) for each in Split)
    boards = {split.board(task_id).rows for task_id in train | test}
    assert len(boards) == len(train) + len(test) == len(maps) and test
    assert all(split.board(task_id).is_test == (task_id in test) for task_id in train | test)
    two = write(tmp_path / "two.json", json.dumps(maps[5:7]))
    both = creator("frozenlake")("x", {"train_file": one, "test_file": two})
    assert both.info.task_counts == {Split.TRAIN: len(maps) - 2, Split.TEST: 2}
    few = creator("frozenlake")("x", {"train_file": str(tmp_path / "*.json"), "train_tasks": 4, "test_tasks": 1})
    assert few.info.task_counts == {Split.TRAIN: 4, Split.TEST: 1}
    assert set(ids(few, Split.TRAIN)) < train  # ids are those of the boards
    for wrong in ("train/00000", "test/../x", "", ids(split, Split.TEST)[0].replace("test", "train")):
        with pytest.raises(UnknownTask):
            split.start(wrong)


@given(text=st.text(alphabet="#@$.*+ -_;|12ax\n", max_size=120))
@settings(max_examples=examples(200))
def test_whatever_is_in_a_level_file_it_is_read_or_refused_in_words(tmp_path_factory, text: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.getbasetemp() / "any.xsb"
    found = []
    with suppress(ValueError):
        found = levels(path, text)
    for board in found:
        assert len({len(row) for row in board.rows}) == 1
        edge = board.rows[0] + board.rows[-1] + "".join(row[0] + row[-1] for row in board.rows)
        assert set(edge) == {"E"}
