"""A text that fits is never called too long, and one that does not is found out in pieces."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from mulligan.policy import text_length
from mulligan.policy.text_length import MoreTokens, check_tokens_of, most_characters
from tests.support.effort import examples


def _byte_pairs() -> Tokenizer:
    """With tokens for long runs, whose cuts change them most."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(["=" * 64, " " * 64, "abcdefgh abcdefgh"] * 9, trainer)
    return made


def _words() -> Tokenizer:
    """It leaves white space and accents out, and makes one token of a word that it does not know."""
    made = Tokenizer(models.WordLevel({"?": 0, "up": 1}, unk_token="?"))
    made.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Strip()])
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def _one_word() -> Tokenizer:
    """All that it does not know is one token together."""
    made = Tokenizer(models.BPE({"?": 0, "a": 1}, [], unk_token="?", fuse_unk=True))
    made.normalizer = normalizers.NFKC()
    return made


TOKENIZERS = {"byte pairs": _byte_pairs(), "words": _words(), "one word": _one_word()}
runs = st.tuples(st.sampled_from(["=", " ", "a", "é", "\u0301", "up ", "abcdefgh", "字", "\n"]), st.integers(1, 200))
texts = st.lists(runs, min_size=1, max_size=8).map(lambda found: "".join(piece * count for piece, count in found))


def encoder(name: str) -> Callable[[str], list[int]]:
    return lambda text: list(TOKENIZERS[name].encode(text, add_special_tokens=False).ids)


def told(encode: Callable[[str], list[int]], text: str) -> int:
    """How many tokens the text is said to have at least, where one would fit; 0: it may fit."""
    try:
        check_tokens_of(encode, text, 1)
    except MoreTokens as error:
        return error.count
    return 0


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=examples(150))
@given(text=texts)
def test_a_text_that_fits_is_never_refused(name: str, text: str) -> None:
    encode = encoder(name)
    count = len(encode(text))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_length, "_PIECE", 64)  # hundreds of cuts in a text of this size
        check_tokens_of(encode, text, max(count, 1))
        found = told(encode, text)
        assert not found or 1 < found <= count


def test_a_text_with_more_tokens_is_tokenised_no_further_than_it_can_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_length, "_PIECE", 1000)
    seen: list[int] = []

    def encode(text: str) -> list[int]:
        seen.append(len(text))
        return [0] * len(text)

    with pytest.raises(MoreTokens) as caught:
        check_tokens_of(encode, "x" * 10**6, 2500)
    assert seen == [1000] * 3 and 2500 < caught.value.count <= 3000
    check_tokens_of(encode, "x" * 10**6, 0)  # any number may be
    check_tokens_of(encode, "x" * 5000, 2500)  # short enough to be tokenised at once
    assert len(seen) == 3


def test_no_normaliser_of_unicode_makes_a_text_shorter_than_is_allowed_for() -> None:
    """Of any character that is taken apart, and put together again."""
    slack = most_characters(0, 1)
    for code in range(sys.maxunicode + 1):
        whole = chr(code)
        for form in ("NFD", "NFKD"):
            apart = unicodedata.normalize(form, whole)
            for back in ("NFC", "NFKC"):
                assert len(apart) <= most_characters(len(unicodedata.normalize(back, apart)), 1) - slack
