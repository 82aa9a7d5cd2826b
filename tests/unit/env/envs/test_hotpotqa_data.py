"""Question files and corpora of HotpotQA, official and as on the hub."""

from __future__ import annotations

import bz2
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from mulligan.env.base import MissingExtra, Split
from mulligan.env.envs.hotpotqa import world as hotpotqa_world
from mulligan.env.envs.hotpotqa.data import Files
from tests.support.kinds import creator

create = creator("hotpotqa")


def search(query: str) -> str:
    return f'<tool_call>{{"name": "local_search", "arguments": {{"query": "{query}"}}}}</tool_call>'


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("hotpotqa")
    hotpotqa_world.write(folder)
    wiki = folder / "wiki" / "AA"
    wiki.mkdir(parents=True)
    pages: list[dict[str, object]] = [
        {"id": "1", "title": "Quux", "text": ["Quux is a lake.", " It is deep."], "charoffset": []},
        {"id": "2", "title": "Empty", "text": []},
        {"id": "3", "title": "Paragraphs", "text": [["One."], [" Two."]]},
    ]
    (wiki / "wiki_00.bz2").write_bytes(bz2.compress("\n".join(map(json.dumps, pages)).encode()))
    return {
        "train_file": str(folder / hotpotqa_world.TRAIN_FILE),
        "test_file": str(folder / hotpotqa_world.TEST_FILE),
        "fullwiki": str(folder / hotpotqa_world.FULLWIKI_FILE),
        "corpus": str(folder / "wiki"),
    }


def test_official_files_are_read(files: dict[str, str]) -> None:
    world = create("hotpotqa", {})
    read = create("x", {"train_file": files["train_file"], "test_file": files["test_file"]})
    assert read.info.task_counts == {Split.TRAIN: 1_000, Split.TEST: 100}
    assert read.list_tasks(Split.TEST, 0, 9) == world.list_tasks(Split.TEST, 0, 9)
    for record in hotpotqa_world.data_sets()[1]:
        game = read.start(f"test/{record['_id']}")
        assert game.observation == record["question"]
        assert game.step(f"\\boxed{{{record['answer']}}}").reward == 1.0


def test_the_fullwiki_setting_searches_the_whole_corpus(files: dict[str, str], tmp_path: Path) -> None:
    settings = {"test_file": files["fullwiki"], "corpus": [files["corpus"]], "index_folder": str(tmp_path)}
    read = create("x", settings)
    assert read.info.task_counts == {Split.TRAIN: 0, Split.TEST: 100}
    for again in (read, create("x", settings)):  # the second time from the kept index
        game = again.start(again.list_tasks(Split.TEST, 0, 1)[0].task_id)
        assert "Quux is a lake. It is deep." in game.step(search("quux")).observation
        assert "One. Two." in game.step(search("paragraphs")).observation
    assert len(list(tmp_path.iterdir())) == 1


def test_a_passage_is_searched_once_however_often_it_is_given(files: dict[str, str]) -> None:
    found = list(Files(files["train_file"], files["test_file"], (files["test_file"],)).passages())
    assert len(set(found)) == len(found)
    assert set(found) <= set(hotpotqa_world.passages())


def as_on_the_hub(record: dict[str, Any]) -> dict[str, Any]:
    """A record of the official files in the columns of the hub's data set."""
    kept = {name: record[name] for name in ("question", "answer", "type", "level")}
    titles, texts = zip(*record["context"], strict=True)
    facts = record["supporting_facts"]
    return {
        "id": record["_id"],
        **kept,
        "supporting_facts": {"title": [title for title, _ in facts], "sent_id": [number for _, number in facts]},
        "context": {"title": list(titles), "sentences": list(texts)},
    }


def write(path: Path, records: list[dict[str, Any]]) -> None:
    """In the format that the name says."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        content = json.dumps(records, indent=1) if path.suffix == ".json" else "\ufeff" + lines.replace("\n", "\r\n")
        path.write_text(content, newline="")


@pytest.mark.parametrize("suffix", ["json", "jsonl", "jsonl.gz", "parquet"])
def test_files_of_the_hub_are_the_same_tasks_and_passages(files: dict[str, str], tmp_path: Path, suffix: str) -> None:
    for split, part in (("train", slice(0, 30)), ("more-train", slice(30, 50))):
        records = json.loads(Path(files["train_file"]).read_text())[part]
        write(tmp_path / f"{split}.{suffix}", list(map(as_on_the_hub, records)))
    hub = {"train_file": str(tmp_path / f"*train.{suffix}"), "test_file": files["test_file"]}
    write(tmp_path / "official.json", json.loads(Path(files["train_file"]).read_text())[:50])
    official = {**hub, "train_file": str(tmp_path / "official.json")}
    read = create("x", hub)
    expected = create("x", official)
    assert read.info.task_counts[Split.TRAIN] == expected.info.task_counts[Split.TRAIN] == 50
    ids = [{task.task_id for task in each.list_tasks(Split.TRAIN, 0, 99)} for each in (read, expected)]
    assert ids[0] == ids[1]
    assert set(Files(**hub).passages()) == set(Files(**official).passages())  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_paragraphs_as_records_and_a_missing_id(files: dict[str, str], tmp_path: Path, suffix: str) -> None:
    official = json.loads(Path(files["train_file"]).read_text())[:9]
    records = [
        {**record, "_id": None, "context": [{"title": title, "sentences": texts} for title, texts in record["context"]]}
        for record in official
    ]
    write(tmp_path / f"a.{suffix}", [{**record, "supporting_facts": None} for record in records])
    write(tmp_path / "official.json", official)
    found, expected = (Files(str(tmp_path / name)) for name in (f"a.{suffix}", "official.json"))
    assert list(found.passages()) == list(expected.passages())
    assert all(len(question.id) == 24 for question in found.questions(found.train_file, 0))


def test_empty_lines_before_an_array(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('\n\n[{"id": "1", "question": "Who?", "answer": "a"}]')
    assert create("x", {"train_file": str(tmp_path / "a.json")}).list_tasks(Split.TRAIN, 0, 9)[0].task_id == "train/1"


def test_parquet_without_pyarrow_names_the_extra(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = json.loads(Path(files["train_file"]).read_text())[0]
    write(tmp_path / "one.parquet", [as_on_the_hub(record)])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match="parquet"):
        create("x", {"train_file": str(tmp_path / "one.parquet")})
    assert create("x", {"train_file": files["train_file"]}).info.task_counts[Split.TRAIN]


def test_a_question_without_an_id_is_named_by_its_words(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "Who?", "answer": "a"}\n{"question": "When?", "answer": "b"}\n')
    (tmp_path / "b.jsonl").write_text('{"question": "When?", "answer": "b", "level": null}\n')
    first, second = (create("x", {"train_file": str(tmp_path / name)}) for name in ("a.jsonl", "b.jsonl"))
    assert first.list_tasks(Split.TRAIN, 1, 1)[0].task_id == second.list_tasks(Split.TRAIN, 0, 1)[0].task_id


def test_a_folder_instead_of_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train_file: no such file: .*it is a folder: name files in it, as .*\*"):
        create("x", {"train_file": str(tmp_path)})


def test_test_questions_are_taken_out_of_training(tmp_path: Path) -> None:
    def write(name: str, *questions: tuple[str, str]) -> str:
        records = [{"_id": id_, "question": text, "answer": "a", "context": []} for id_, text in questions]
        (tmp_path / name).write_text(json.dumps(records))
        return str(tmp_path / name)

    train = write("train.json", ("1", "Who?"), ("2", "  WHAT? "))
    test = write("test.json", ("3", "What?"))
    read = create("x", {"train_file": train, "test_file": test})
    assert [task.task_id for task in read.list_tasks(Split.TRAIN, 0, 9)] == ["train/1"]
    with pytest.raises(ValueError, match="'1' is there twice"):
        create("x", {"train_file": write("twice.json", ("1", "Who?"), ("1", "When?"))})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[{", "not a JSON array"),
        ("{", ":1: .*expected a JSON array of records, a JSON object in each line, or Parquet"),
        ("id,question,answer", ":1: .*expected a JSON array"),
        ('{"a": 1}', ":1: .*question"),
        ('{"id": "1", "question": "Who?", "answer": "a"}\n\n{"id": "2", "question": 3}', ":3: .*question"),
        ('{"id": "1", "question": "Who?", "answer": null}', ":1 has no question or no answer"),
        (f'{{"id": "{"x" * 191}", "question": "Who?", "answer": "a"}}', ":1: its id has 191 characters"),
        ('[{"id": "1", "question": "Who?", "answer": "a", "context": {"title": ["t"]}}]', "record 0: .*sentences"),
        (
            '[{"id": "1", "question": "Who?", "answer": "a", "context": {"title": ["t"], "sentences": []}}]',
            "record 0: context: 1 in `title` and 0 in `sentences`",
        ),
        ("PAR1 and no more", "not a Parquet file"),
        ("", "no records"),
        ('[{"_id": "1"}]', "record 0: .*question"),
        ('[{"_id": "1", "question": "Who?", "context": []}]', "record 0 has no question or no answer"),
        ('[{"_id": [1], "question": "Who?", "answer": "a"}]', "record 0: .*_id"),
        ('[{"_id": "1", "question": "Who?", "answer": "a", "context": [["t"]]}]', "record 0: .*context"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"bad.json.*{words}"):
        create("x", {"test_file": str(path)})


def test_a_bad_corpus_is_named(files: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "pages.jsonl").write_text('{"title": "A", "text": "a"}\n\n{"title": 3}\n')
    with pytest.raises(ValueError, match=r"pages\.jsonl:3: "):
        create("x", {"test_file": files["test_file"], "corpus": [str(tmp_path / "pages.jsonl")]})
