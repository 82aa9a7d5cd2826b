"""The benchmark under torchrun, as on several GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.support.paths import IMPORT_ROOTS, ROOT


@pytest.mark.long
@pytest.mark.timeout(300)
def test_two_processes_measure_together() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    benchmark = ["-m", "benchmarks.scale", "--device", "cpu", "--shape", "tiny", "--quick", "--rows", "64"]
    done = subprocess.run(
        [*torchrun, *benchmark, "--ways", "lora-16"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": IMPORT_ROOTS, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert [(one["trained"], one["gpus"]) for one in result["ways"]] == [("lora-16", 2)] * 3
    assert all(one["tokens_per_second"] > 0 for one in result["ways"])
