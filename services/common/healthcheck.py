"""`python -m mulligan.common.healthcheck HOST:PORT`: exits with 0 when the service serves, else with 1. For
containers."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from mulligan.common.channel import is_healthy


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mulligan.common.healthcheck", description=__doc__)
    parser.add_argument("address", help="HOST:PORT of a service")
    parser.add_argument("--timeout", type=float, default=4.0, help="seconds")
    parser.add_argument("--tls-ca", type=Path, help="PEM file: the authority of a service that speaks TLS")
    parser.add_argument("--tls-name", default="", help="the name in its certificate")
    given = parser.parse_args(arguments)
    try:
        tls_ca = given.tls_ca.read_bytes() if given.tls_ca else None
    except OSError as error:
        sys.exit(f"--tls-ca: {error}")
    if not asyncio.run(is_healthy(given.address, given.timeout, tls_ca=tls_ca, tls_name=given.tls_name)):
        sys.exit(f"{given.address} does not serve")


if __name__ == "__main__":
    main()
