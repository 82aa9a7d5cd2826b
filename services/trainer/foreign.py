"""Calls of a plug-in's own code, which may raise anything."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from mulligan.common.tasks import is_asked_to_end

# What is a failure of the code that raised it. SystemExit would end the trainer, and again whenever the run goes on.
FAILURES = (Exception, asyncio.CancelledError, SystemExit)


@contextmanager
def blaming(what: str, failure: type[Exception], passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Within it, code of the plug-in `what` runs. What it raises is raised as `failure`, with its traceback.

    What is `passing` is raised as it is, and so is the cancellation of the task by somebody. A CancelledError without
    one, such as that of a cancelled subtask, is a failure like any other.
    """
    try:
        yield
    except passing:
        raise
    except FAILURES as error:
        if isinstance(error, asyncio.CancelledError) and is_asked_to_end():
            raise
        frames = "".join(traceback.format_exception(error))
        raise failure(f"{what} raised\n{frames}") from error
