"""A process of a learner that does nothing but join the others (`torchrun … -m tests.support.joining FILE`).

Once all have joined, the first one appends a line to FILE: the process ids by rank, as JSON. It then waits for SIGTERM,
as a server without calls does; the others wait for the next call.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from mulligan.common.config import refuse
from mulligan.trainer.learner.ranks import BadLaunch, Ranks, refusals_are_final


def main(file: str) -> None:
    with refusals_are_final():
        try:
            ranks = Ranks.join("cpu")
        except BadLaunch as error:
            refuse("trainer", str(error))
    with ranks.in_step():
        pids = ranks.gather(os.getpid())
        if not ranks.is_first:
            while ranks.next_call() is not None:
                pass
            return
    with Path(file).open("a") as opened:
        opened.write(f"{json.dumps(pids)}\n")
    signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
