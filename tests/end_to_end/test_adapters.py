"""A run that trains adapters of a real language model, which a real SGLang serves: `python -m proof --only
sglang-adapters`. A short case, with the embedded model, is in `test_engines.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from mulligan.testing.processes import ServiceProcesses
from mulligan.testing.sglang_servers import LAUNCH_SECONDS
from proof.adapters import STEPS, assert_verified, train
from tests.support.found import language_model, sglang_variable


@pytest.mark.long
@pytest.mark.timeout(LAUNCH_SECONDS + 1200)
def test_every_version_is_verified_and_changes_the_answers(services: ServiceProcesses, tmp_path: Path) -> None:
    sglang_variable("MULLIGAN_TEST_SGLANG_PYTHON")
    measured = train(services, tmp_path, language_model(), steps=STEPS)
    assert len(measured["versions"]) == STEPS + 2
    assert_verified(measured, steps=STEPS)
