"""What libraries log, in a fresh interpreter: pytest has handlers of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from mulligan.common.logs import LINE_LIMIT, VALUE_LIMIT
from tests.support.paths import IMPORT_ROOTS

LOGGING = """
import asyncio
import logging
from mulligan.common.logs import configure_logging
from mulligan.memory.config import MemorySettings
configure_logging(MemorySettings(log_format="json"))
library = logging.getLogger("a.library")
library.error("long " + 1_000_000 * "x")
library.info("not shown")
try:
    raise ValueError("deep " + 1_000_000 * "y")
except ValueError:
    library.exception("two\\nlines")
library.warning("%d", "no number")
library.log(37, "a level of its own")
library.error("a call that ended with its server", exc_info=asyncio.CancelledError())
"""


def test_what_libraries_log_is_a_short_line_like_any_other_but_cancellations_are_no_errors() -> None:
    environment = {**os.environ, "PYTHONPATH": IMPORT_ROOTS}
    done = subprocess.run([sys.executable, "-c", LOGGING], env=environment, capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert max(map(len, lines)) < LINE_LIMIT
    long, deep, bad, odd = map(json.loads, lines)
    assert all((line["logger"], line["service"]) == ("a.library", "memory") for line in (long, deep, bad, odd))
    assert long["event"].startswith("long xxx") and len(long["event"]) <= VALUE_LIMIT and long["level"] == "error"
    assert deep["event"] == "two\nlines" and "ValueError: deep yyy" in deep["exception"]
    assert bad["event"] == "a line that cannot be formatted: TypeError" and bad["level"] == "warning"
    assert (odd["event"], odd["level"]) == ("a level of its own", "warning")


ON_A_TERMINAL = """
import structlog
from mulligan.common.logs import configure_logging
from mulligan.memory.config import MemorySettings
configure_logging(MemorySettings(log_format="console"))
log = structlog.get_logger()
foreign = "\\x1b[2J\\x9b\\u202e of\\n2026 [info] forged"
log.info(foreign, name=foreign, many=[foreign])
try:
    raise ValueError(foreign)
except ValueError:
    log.exception("failed")
"""


def test_on_a_terminal_no_value_is_a_control_sequence_or_a_line_of_its_own() -> None:
    environment = {**os.environ, "PYTHONPATH": IMPORT_ROOTS}
    done = subprocess.run(
        [sys.executable, "-c", ON_A_TERMINAL], env=environment, capture_output=True, text=True, check=True
    )
    assert not {"\x1b", "\x9b", "\u202e"} & set(done.stderr)
    first, *later = done.stderr.splitlines()
    assert "\\x1b[2J\\x9b\\u202e of\\n2026 [info] forged" in first and "failed" in later[0], (
        "a traceback alone has several lines"
    )
