"""A learner that another process loads from a checkpoint ends bit-equal to one that was never interrupted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mulligan.trainer.settings import LoraSettings
from tests.support.learning import FULL, LORA, learn, make, weights_digest
from tests.support.paths import IMPORT_ROOTS, ROOT
from tests.support.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


RESUME = """
import sys
from pathlib import Path
from tests.support.learning import FULL, LORA, learn, make, weights_digest
tiny, folder, kind = sys.argv[1:]
learner = make(Path(tiny), Path(folder), LORA if kind == "lora" else FULL)
learner.load_checkpoint("middle")
learn(learner, range(3, 6))
print(weights_digest(learner))
"""


@pytest.mark.parametrize("lora", [pytest.param(FULL, marks=pytest.mark.long), LORA])
def test_a_resumed_learner_ends_bit_equal(tiny: Path, tmp_path: Path, lora: LoraSettings | None) -> None:
    straight = make(tiny, tmp_path / "straight", lora)
    learn(straight, range(6))
    interrupted = make(tiny, tmp_path / "interrupted", lora)
    learn(interrupted, range(3))
    interrupted.save_checkpoint("middle")
    command = [sys.executable, "-c", RESUME, str(tiny), str(tmp_path / "interrupted"), "lora" if lora else "full"]
    environment = os.environ | {"PYTHONPATH": IMPORT_ROOTS}
    resumed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.split()[-1] == weights_digest(straight) != weights_digest(interrupted)
