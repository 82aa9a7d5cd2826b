"""Text of strangers is cut to what a log line and a status can carry."""

from __future__ import annotations

import json
from typing import Any

from google.rpc import status_pb2
from hypothesis import given
from hypothesis import strategies as st

from mulligan.common.errors import DomainError, Reason
from mulligan.common.status import to_status
from mulligan.common.text import bounded

ANY = st.characters(codec=None)  # surrogates, too
LONG = st.builds(lambda text, count: text * count, st.text(ANY, max_size=20), st.integers(0, 20_000))
TEXTS = st.one_of(st.text(ANY, max_size=4000), LONG)
GRPC_LIMIT = 8 * 1024  # of all trailing metadata


@given(TEXTS, st.integers(100, 2000))
def test_it_fits_and_can_be_encoded(text: str, limit: int) -> None:
    short = bounded(text, limit)
    assert len(json.dumps(short)) - 2 <= limit
    short.encode()
    assert bounded(short, limit) == short, "cutting again changes nothing"


@given(st.text(max_size=16))
def test_what_fits_stays_as_it_is(text: str) -> None:
    assert bounded(text, 200) == text


def test_beginning_and_end_are_kept() -> None:
    assert bounded("beginning" + "x" * 1000 + "end", 200).startswith("beginning")
    assert bounded("beginning" + "x" * 1000 + "end", 200).endswith("end")
    assert bounded("x" * 1_000_000, 164) == "x" * 75 + " … 999,900 characters left out … " + "x" * 25


@given(TEXTS, st.dictionaries(st.sampled_from(["field", "expected"]), TEXTS))
def test_a_status_stays_below_the_limit_of_metadata(message: str, metadata: dict[str, Any]) -> None:
    status = to_status(DomainError(Reason.INVALID_FIELD, message, **metadata))
    [(_, details)] = status.trailing_metadata
    percent_encoded = sum(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in status.details.encode())
    assert percent_encoded + len(details) * 4 / 3 < GRPC_LIMIT
    assert status_pb2.Status.FromString(details).message == status.details
