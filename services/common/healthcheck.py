"""`python -m mulligan.common.healthcheck HOST:PORT`: exits with 0 when the service serves, else with 1. For
containers."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mulligan.common.channel import is_healthy
from mulligan.common.tls import BadTls, read_client_tls


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mulligan.common.healthcheck", description=__doc__)
    parser.add_argument("address", help="HOST:PORT of a service")
    parser.add_argument("--service", default="", help="the gRPC service that is asked for; the whole server without it")
    parser.add_argument("--timeout", type=float, default=4.0, help="seconds")
    for part, said in (
        ("ca", "PEM file: the authorities of a service that speaks TLS"),
        ("name", "the name in its certificate"),
        ("cert", "PEM file: what identifies this program, where the service asks for that"),
        ("key", "PEM file: the key of --tls-cert"),
    ):
        variable = f"MULLIGAN_HEALTHCHECK_TLS_{part.upper()}"
        default = os.environ.get(variable, "")
        parser.add_argument(f"--tls-{part}", default=default, help=f"{said}; also {variable}")
    given = parser.parse_args(arguments)
    ca, cert, key = (Path(file) if file else None for file in (given.tls_ca, given.tls_cert, given.tls_key))
    try:
        tls = read_client_tls(ca, given.tls_name, cert, key)
    except (BadTls, ValueError) as error:
        sys.exit(f"--tls-…: {error}")
    if not asyncio.run(is_healthy(given.address, given.timeout, tls, given.service)):
        sys.exit(f"{given.address} does not serve")


if __name__ == "__main__":
    main()
