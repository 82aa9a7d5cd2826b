"""The `mulligan` command. Errors are one sentence, never a traceback."""

from __future__ import annotations

import os
import signal
import sys

from mulligan.common.extras import how_to_install


def _end(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would cut the clean-up off
    raise SystemExit(128 + signal.SIGTERM)


def main() -> None:
    """Exit status: 1 a service refused or failed, 2 the command was called wrongly, 130 interrupted, 143 ended by
    SIGTERM. Also then the program ends what it started, and removes what it left unfinished."""
    signal.signal(signal.SIGTERM, _end)
    # gRPC's core, which reads it when it is imported, would write of each idle connection that a server has closed.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        from mulligan.cli.app import run_app
    except ImportError as error:
        if (error.name or "").startswith("mulligan"):
            raise
        print(f"error: the command needs the extra 'cli' ({error}): {how_to_install('cli')}", file=sys.stderr)
        sys.exit(2)
    run_app()


if __name__ == "__main__":
    main()
