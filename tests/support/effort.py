"""How much a test tries: less in `make test`, and still less in `make unit`, which an author runs again and again."""

from __future__ import annotations

import pytest
from hypothesis import settings

HOSTILE_CHARACTERS = 2**18  # of a text that is made to take long: in quadratic time, minutes
LINEAR_TIME = pytest.mark.timeout(60)  # of a test that reads such texts in a fraction of a second


def examples(count: int) -> int:
    """So many examples with the profile `thorough`; in a quicker one (conftest.py), its share of them."""
    share = settings().max_examples / settings.get_profile("thorough").max_examples
    return max(1, int(count * share))
