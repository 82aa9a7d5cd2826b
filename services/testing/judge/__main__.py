"""`python -m mulligan.testing.judge FOLDER [--seed N] [--steps N] [--troubles N] [--kinds kill,power]`: trains under
faults, prints what happened, and each rule that was broken with its calls. The folder, which must be new, keeps the
history, and the state and logs of the services."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path

from mulligan.testing.judge.nemesis import TROUBLES
from mulligan.testing.judge.trial import Adversity, hold, judged_run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mulligan.testing.judge", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000, help="of the run, which is stopped after the troubles")
    parser.add_argument("--troubles", type=int, default=20)
    parser.add_argument("--kinds", default=",".join(TROUBLES), help="of troubles, with commas between them")
    parser.add_argument("--plugin", action="append", default=[], help="SERVICE=MODULE:NAME, as launch.py has it")
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True)
    plugins: dict[str, list[str]] = {}
    for plugin in chosen.plugin:
        service, _, name = plugin.partition("=")
        plugins.setdefault(service, []).append(name)
    adversity = Adversity(chosen.troubles, chosen.kinds.split(","), plugins=plugins)
    settings = judged_run(steps=chosen.steps, seed=chosen.seed)
    trial = asyncio.run(hold(chosen.folder.absolute(), settings, adversity, seed=chosen.seed))
    print(json.dumps(trial.summary, indent=2))
    sys.exit(bool(trial.violations))


if __name__ == "__main__":
    main()
