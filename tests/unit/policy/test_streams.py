"""Text that comes in pieces is the text that would have come at once, and streams that run together end together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mulligan.models import EMBEDDED
from mulligan.policy.huggingface.tokenizer import Tokenizer
from mulligan.policy.streams import TextStream, merged, unsettling_token
from tests.support.effort import examples
from tests.support.llama_model import write_llama_model
from tests.support.tiny_model import write_tiny_model

Decode = Callable[[Sequence[int]], str]


def sentencepiece() -> Tokenizer:
    """As Llama 2 and Gemma do it: words with a mark for the space before them, and bytes for what has no piece."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "▁a",
        "▁ab",
        "é",
        "▁é",
    ]
    inner = Inner(models.BPE({piece: index for index, piece in enumerate(pieces)}, [], byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", bos_token="<s>"))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, int]]:
    folder = tmp_path_factory.mktemp("tokenizers")
    found = {
        "embedded": Tokenizer.load(str(EMBEDDED)),
        "bytes": Tokenizer.load(str(write_llama_model(folder / "llama"))),
        "words": Tokenizer.load(str(write_tiny_model(folder / "tiny"))),
        "pieces": sentencepiece(),
    }
    return {name: (tokenizer, len(tokenizer.inner)) for name, tokenizer in found.items()}


def in_pieces(decode: Decode, parts: Sequence[Sequence[int]], unsettling: int | None = None) -> list[str]:
    text = TextStream(decode, unsettling)
    return [text.push(part, last=index == len(parts) - 1) for index, part in enumerate(parts)]


NAMES = ("embedded", "bytes", "words", "pieces")
TEXTS = st.text(
    st.one_of(st.sampled_from("ab éABCD\n.,'€😀\u0301中\u200d"), st.characters(exclude_categories=["Cs"])), max_size=40
)


def unsettling(tokenizer: Tokenizer) -> int | None:
    return unsettling_token(tokenizer.encode, tokenizer.decode)


def test_tokenizers_whose_bytes_depend_on_those_after_them_are_known(
    tokenizers: dict[str, tuple[Tokenizer, int]],
) -> None:
    found = {name: unsettling(tokenizer) for name, (tokenizer, _) in tokenizers.items()}
    assert [name for name, token in found.items() if token is not None] == ["embedded", "pieces"]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=examples(60))
@given(data=st.data())
def test_pieces_of_any_tokens_add_up(
    tokenizers: dict[str, tuple[Tokenizer, int]], name: str, data: st.DataObject
) -> None:
    """Also of tokens that are no text: half characters, special tokens between the bytes of one."""
    tokenizer, size = tokenizers[name]
    parts = data.draw(st.lists(st.lists(st.integers(0, size - 1), max_size=5), min_size=1, max_size=30))
    whole = tokenizer.decode([token for part in parts for token in part])
    assert "".join(in_pieces(tokenizer.decode, parts, unsettling(tokenizer))) == whole


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=examples(50))
@given(text=TEXTS, data=st.data())
def test_pieces_of_text_add_up_and_split_no_character(
    tokenizers: dict[str, tuple[Tokenizer, int]], name: str, text: str, data: st.DataObject
) -> None:
    tokenizer, _ = tokenizers[name]
    ids = tokenizer.encode(text)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(ids)), max_size=len(ids))))
    parts = [ids[start:end] for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    whole = tokenizer.decode(ids)
    pieces = in_pieces(tokenizer.decode, parts, unsettling(tokenizer))
    assert "".join(pieces) == whole
    if "\ufffd" not in whole:
        assert not any("\ufffd" in piece for piece in pieces)


def test_text_comes_as_soon_as_it_is_certain(tokenizers: dict[str, tuple[Tokenizer, int]]) -> None:
    tokenizer, _ = tokenizers["bytes"]
    ids = tokenizer.encode("a€b")
    assert len(ids) == 5
    assert in_pieces(tokenizer.decode, [[token] for token in ids]) == ["a", "", "", "€", "b"]
    assert in_pieces(tokenizer.decode, [[token] for token in ids[:3]]) == ["a", "", "\ufffd"]


def test_a_long_stream_decodes_few_tokens_at_a_time(tokenizers: dict[str, tuple[Tokenizer, int]]) -> None:
    tokenizer, _ = tokenizers["bytes"]
    longest = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return tokenizer.decode(ids)

    text = "the cat € sat on the mat 😀 " * 50
    ids = tokenizer.encode(text)
    assert "".join(in_pieces(decode, [[token] for token in ids])) == text
    assert longest <= 10


async def counted(
    name: str, count: int, closed: list[str], error: Exception | None = None
) -> AsyncGenerator[str, None]:
    try:
        for index in range(count):
            await asyncio.sleep(0)
            yield f"{name}{index}"
        if error is not None:
            raise error
    finally:
        closed.append(name)


async def test_merged_streams_bring_all_in_their_own_order() -> None:
    closed: list[str] = []
    found = [
        item async for item in merged([counted("a", 3, closed), counted("b", 100, closed), counted("c", 0, closed)])
    ]
    assert len(found) == 103 and sorted(closed) == ["a", "b", "c"]
    for name in "ab":
        own = [item for item in found if item.startswith(name)]
        assert own == [f"{name}{index}" for index in range(len(own))]
    assert found.index("b0") < found.index("a2"), "none waits for another"


async def test_one_that_fails_ends_the_others() -> None:
    closed: list[str] = []
    stream = merged([counted("a", 10**9, closed), counted("b", 2, closed, RuntimeError("broken"))])
    with pytest.raises(RuntimeError, match="broken"):
        assert [item async for item in stream]
    assert sorted(closed) == ["a", "b"]


async def test_a_listener_that_leaves_ends_them_all() -> None:
    closed: list[str] = []
    async with aclosing(merged([counted(name, 10**9, closed) for name in "abc"])) as stream:
        assert await anext(stream) == "a0"
    assert sorted(closed) == ["a", "b", "c"]
