"""A run that trains adapters of a real language model, which a real SGLang serves, in one step.

The long case, of three steps, is `python -m proof --only sglang-adapters`; a short one, with the embedded model, is in
`test_engines.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from mulligan.testing.processes import ServiceProcesses
from mulligan.testing.sglang_servers import LAUNCH_SECONDS
from proof.adapters import assert_verified, train
from tests.support.found import language_model, sglang_variable


@pytest.mark.long
@pytest.mark.timeout(LAUNCH_SECONDS + 1200)
def test_every_version_is_verified_and_changes_the_answers(services: ServiceProcesses, tmp_path: Path) -> None:
    sglang_variable("MULLIGAN_TEST_SGLANG_PYTHON")
    measured = train(services, tmp_path, language_model(), steps=1)
    assert len(measured["versions"]) == 3
    assert_verified(measured, steps=1)
