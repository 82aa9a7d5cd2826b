"""Plays `tests.support.hostile` in a sandbox: `python -m tests.support.fenced USER FORBID FOLDER ACTION…`.

The sandbox is made by the user with number USER. With FORBID = 1 the kernel allows no namespaces to it, as in most
containers. Prints as JSON what protects, and what the actions got.
"""

from __future__ import annotations

import errno
import json
import os
import sys

import pyseccomp

from mulligan.common.types import Split
from mulligan.env.sandbox import ProcessLimits, Sandboxed


def main() -> None:
    user, forbid, folder, *actions = sys.argv[1:]
    if int(user) != os.getuid():
        os.setgroups([])
        os.setgid(int(user))
        os.setuid(int(user))
    if int(forbid):
        rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
        rules.add_rule(pyseccomp.ERRNO(errno.EPERM), "unshare")
        rules.load()
    environment = Sandboxed(
        "hostile", {"kind": "tests.support.hostile", "folder": folder}, ProcessLimits(128, max_tasks=256), 20.0
    )
    try:
        (task, *_) = environment.list_tasks(Split.TRAIN, 0, 1)
        episode = environment.start(task.task_id)
        isolation = environment.isolation
        got = {action: episode.step(action).observation for action in actions}
        print(json.dumps({"namespaces": isolation.namespaces, "lacks": isolation.lacks, **got}))
    finally:
        environment.close()


if __name__ == "__main__":
    main()
