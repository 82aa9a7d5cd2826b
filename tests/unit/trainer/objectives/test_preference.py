"""What a preference refuses; `tests/reference/test_trl.py` compares its loss with TRL."""

from __future__ import annotations

import pytest

from mulligan.trainer.objective import Tokens
from mulligan.trainer.objectives.preference import Preference


@pytest.mark.parametrize(("field", "beta", "ftx"), [("beta", 0.0, 0.0), ("ftx", 0.1, -1.0)])
def test_numbers_of_no_use_are_refused(field: str, beta: float, ftx: float) -> None:
    unusable = Preference(Tokens((2, 3), (False, True)), beta, ftx).unusable((3,))
    assert unusable is not None and unusable.field == field
