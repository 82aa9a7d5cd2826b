from __future__ import annotations

import math
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from mulligan.env.base import MissingExtra
from mulligan.env.search import Bm25, Dense, kept_bm25, kept_dense, load_encoder
from tests.support.encoders import create

TITLES = ["Ada", "Bor", "Cil", "Dun", "Eve"]
TEXTS = [
    "was born in Vell and wrote",
    "was born in Sorn",
    "built a bridge in Vell over the river",
    "is a river",
    "wrote about the bridge the bridge and the river",
]
PASSAGES = list(zip(TITLES, TEXTS, strict=True))


def bm25(query: list[str], k1: float = 1.2, b: float = 0.75) -> list[float]:
    """Robertson and Zaragoza 2009, with the idf that is never negative."""
    documents = [f"{title} {text}".lower().split() for title, text in PASSAGES]
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        counts = Counter(document)
        score = 0.0
        for word in query:
            n = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
            norm = k1 * (1 - b + b * len(document) / mean)
            score += idf * counts[word] * (k1 + 1) / (counts[word] + norm)
        scores.append(score)
    return scores


@pytest.mark.parametrize("query", ["Vell", "the bridge", "born in vell", "river ADA river"])
def test_scores_are_those_of_the_formula(query: str) -> None:
    words = list(dict.fromkeys(query.lower().split()))
    expected = {TITLES[n]: score for n, score in enumerate(bm25(words)) if score > 0}
    hits = Bm25.build(PASSAGES).search(query, 5)
    assert {hit.passage.title: hit.score for hit in hits} == pytest.approx(expected, rel=1e-4)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_passages_come_back_as_they_went_in() -> None:
    odd = [("T\N{SNOWMAN}\0", 'tab\t"quote" \N{SNOWMAN} vell\n'), ("", "vell")]
    hits = Bm25.build(odd).search("vell", 5)
    assert {(hit.passage.number, hit.passage.title, hit.passage.text) for hit in hits} == {
        (number, title, text) for number, (title, text) in enumerate(odd)
    }


def test_words_are_found_in_other_forms_and_among_equals_the_first_wins() -> None:
    index = Bm25.build([(f"Town {number}", "bridges") for number in range(40)])
    assert [hit.passage.number for hit in index.search("bridge!", 5)] == [0, 1, 2, 3, 4]
    assert len(index.search("BRIDGES", 100)) == 40


@pytest.mark.parametrize("query", ["", "  ", "?!", "NOR XOR", "nowhere", "\0", "x" * 10_000, "\ud800"])
def test_what_finds_nothing_finds_nothing(query: str) -> None:
    assert Bm25.build(PASSAGES).search(query, 5) == []
    assert Bm25.build([]).search("a", 5) == []


INDEX = Bm25.build(PASSAGES)


@given(st.text(max_size=300) | st.text(alphabet='vel "():^~*?[]{}+-&|!\\/\ud800', max_size=80))
def test_any_text_is_a_query(query: str) -> None:
    hits = INDEX.search(query, 3)
    assert len(hits) <= 3
    assert all(first.score >= second.score for first, second in pairwise(hits))


def test_a_long_query_is_cut() -> None:
    assert [hit.passage.title for hit in INDEX.search("dun " + "filler " * 100_000, 1)] == ["Dun"]


def test_searches_from_many_threads_do_not_mix() -> None:
    index = Bm25.build([(f"T{number}", f"word{number} of many") for number in range(500)])
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda n: index.search(f"word{n}", 1)[0].passage.number, [*range(500)] * 4))
    assert found == [*range(500)] * 4


def test_an_index_is_kept_and_made_again_for_other_content(tmp_path: Path) -> None:
    made = kept_bm25(PASSAGES, tmp_path, "one")

    def unread() -> object:
        raise AssertionError("a kept index reads no passages")

    again = kept_bm25(iter(unread, None), tmp_path, "one")  # type: ignore[arg-type]
    assert again.search("bridge river", 5) == made.search("bridge river", 5) == INDEX.search("bridge river", 5)
    assert kept_bm25(PASSAGES[:1], tmp_path, "two").search("river", 5) == []
    assert len(list(tmp_path.iterdir())) == 2


def test_one_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def broken() -> object:
        yield PASSAGES[0]
        raise ValueError("no such page")

    with pytest.raises(ValueError, match="no such page"):
        kept_bm25(broken(), tmp_path, "one")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_servers_that_start_together_share_a_folder(tmp_path: Path) -> None:
    start = threading.Barrier(4)

    def build(_: int) -> list[str]:
        start.wait()
        return [hit.passage.title for hit in kept_bm25(PASSAGES, tmp_path, "one").search("bridge", 5)]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(build, range(4)))
    assert found == [["Eve", "Cil"]] * 4
    assert len(list(tmp_path.iterdir())) == 1


def test_dense_finds_the_nearest_vectors(tmp_path: Path) -> None:
    encoder = create({})
    index = kept_dense(PASSAGES, tmp_path, "one", encoder, "letters")
    vectors = encoder.encode([f"{title}\n{text}" for title, text in PASSAGES], query=True)
    expected = vectors @ encoder.encode(["bridge over the river"], query=True)[0]
    hits = index.search("bridge over the river", 3)
    assert [hit.passage.number for hit in hits] == np.argsort(-expected)[:3].tolist()
    assert [hit.score for hit in hits] == pytest.approx(np.sort(expected)[::-1][:3])
    assert index.search("", 3) == [] == Dense.build([], encoder).search("a", 3)
    again = kept_dense(PASSAGES, tmp_path, "one", encoder, "letters")
    assert again.search("bridge over the river", 3) == hits
    assert encoder.encoded == len(PASSAGES)
    assert [path.suffix for path in tmp_path.iterdir()] == [".npy"]


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    words = sorted({word for title, text in PASSAGES for word in f"{title} {text}".lower().split()})
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *words, "query", "passage", ":"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_transformers_encoder(tiny_bert: Path, pooling: str) -> None:
    settings = {"model": str(tiny_bert), "pooling": pooling, "max_tokens": 16}
    encoder = load_encoder("transformers", settings)
    texts = ["born in vell", "the bridge over the river in sorn", "x " * 100]
    together = encoder.encode(texts, query=False)
    assert together.shape == (3, 16) and together.dtype == np.float32
    assert np.linalg.norm(together, axis=1) == pytest.approx([1.0] * 3, rel=1e-5)
    for text, row in zip(texts, together, strict=True):  # padding changes nothing
        assert encoder.encode([text], query=False)[0] == pytest.approx(row, abs=1e-5)
    assert not np.allclose(encoder.encode(texts, query=True), together, atol=1e-3)  # another prefix
    index = Dense.build(PASSAGES, encoder)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: index.search(text, 1), TEXTS * 8))
    assert found == [index.search(text, 1) for text in TEXTS] * 8


def test_an_encoder_that_cannot_be_had_is_named(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="encoder: there is no encoder 'no_such'; there are transformers"):
        load_encoder("no_such", {})
    with pytest.raises(ValueError, match=r"encoder: 'json\.decoder' is no encoder"):
        load_encoder("json.decoder", {})
    with pytest.raises(ValueError, match="pooling"):
        load_encoder("transformers", {"pooling": "max"})
    with pytest.raises(ValueError, match=r"device: no such device 'cuta': expected .*; did you mean 'cuda'"):
        load_encoder("transformers", {"model": str(tiny_bert), "device": "cuta"})
    with pytest.raises(ValueError, match="model: '/no/such' cannot be loaded"):
        load_encoder("transformers", {"model": "/no/such"})
    monkeypatch.delitem(sys.modules, "mulligan.env.encoders.transformers.encoder")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtra, match="hotpotqa-dense"):
        load_encoder("transformers", {})
