"""Where the repository lies, and what a Python process needs on its path to import it."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMPORT_ROOTS = os.pathsep.join([str(ROOT), str(ROOT / "src")])  # of `tests`, `proof` and `benchmarks`; of `mulligan`
