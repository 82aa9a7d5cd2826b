"""Long texts are tokenised by a call that lets other threads run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from mulligan.policy.huggingface.tokenizer import Tokenizer
from tests.support.chat_templates import CHATML, TOKENIZER, wrapped

LONG = "a <|im_end|> é ＜|im_end|＞ \u0301 字\n" * 200


def test_a_long_text_has_the_tokens_and_spans_that_it_has_at_once() -> None:
    subject = wrapped(CHATML)
    assert isinstance(subject, Tokenizer)
    encoding = TOKENIZER.encode(LONG, add_special_tokens=False)
    whole = subject.inner.backend_tokenizer.encode(LONG, add_special_tokens=False)
    assert len(LONG) > 1000 and subject.encode(LONG) == whole.ids == encoding.ids
    assert subject._spans(LONG) == (whole.ids, whole.offsets)


def test_a_long_text_is_never_given_to_the_call_that_stops_all_threads() -> None:
    """`encode` of the tokenizers library holds Python's lock, `encode_batch` and `encode_batch_fast` do not."""
    subject = wrapped(CHATML)
    inner = subject.inner.backend_tokenizer
    alone: list[int] = []

    def encode(text: str, **options: Any) -> Any:
        alone.append(len(text))
        return inner.encode(text, **options)

    batch, fast = inner.encode_batch, inner.encode_batch_fast
    stand_in = SimpleNamespace(encode=encode, encode_batch=batch, encode_batch_fast=fast)
    subject.inner = SimpleNamespace(backend_tokenizer=stand_in)
    subject.encode(LONG)
    subject._spans(LONG)
    assert not alone
    subject.encode("short")
    assert alone == [5]


def test_the_longest_token_is_known() -> None:
    assert wrapped(CHATML).longest_token == len("<|start_header_id|>")
