"""The command line of `mulligan certs`; where there is no `mulligan`, `python -m mulligan.common.certs`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from mulligan.common.certificates import AUTHORITY_DAYS, Certificates, RotationStep, general_name
from mulligan.common.config import SERVICES
from mulligan.common.suggest import did_you_mean

_DESCRIPTION = """\
Makes a private authority, a certificate for each service, and one for callers of each role. Called again, it makes
those again that end soon or that are damaged, and leaves the others as they are. FOLDER has `authority`, whose key
nobody else needs; services/NAME and clients/ROLE, each with tls.crt, tls.key and ca.crt. Trainer and memory
have the keys of credentials of runs, too: run-keys.pem."""
_NEXT = {
    RotationStep.TRUST: "now give all services and callers their new ca.crt; then --rotate issue",
    RotationStep.ISSUE: "now give all services and callers their new tls.crt and tls.key; then --rotate retire",
    RotationStep.RETIRE: "now give all services and callers their new ca.crt, and the old authority is gone",
}


def main(arguments: Sequence[str] | None = None, program: str = "python -m mulligan.common.certs") -> None:
    parser = argparse.ArgumentParser(prog=program, description=_DESCRIPTION)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the files are")
    parser.add_argument(
        "--name",
        action="append",
        default=[],
        type=_name,
        metavar="SERVICE=NAME",
        help="a further host name or IP address of a service; may be given again",
    )
    parser.add_argument(
        "--other",
        action="append",
        default=[],
        type=_other,
        metavar="NAME",
        help="host name of another server that services call, as a collector of traces; its files are in others/NAME",
    )
    parser.add_argument("--days", type=_days, default=365, help="how long new certificates last; 365 unless given")
    parser.add_argument("--group", action="store_true", help="lets the group read the files, but for the authority's")
    parser.add_argument(
        "--rotate",
        type=RotationStep,
        choices=list(RotationStep),
        help="a step of the replacement of the authority, in this order (docs/security.md)",
    )
    given = parser.parse_args(arguments)
    names: dict[str, list[str]] = {}
    for service, name in given.name:
        names.setdefault(service, []).append(name)
    certificates = Certificates(given.folder, names, given.days, given.group, given.other)
    try:
        made = certificates.update(given.rotate)
        _tell(certificates, made)
    except OSError as error:
        sys.exit(f"error: {error}")
    if given.rotate:
        print(_NEXT[given.rotate], file=sys.stderr)


def _tell(certificates: Certificates, made: Sequence[str]) -> None:
    ends = certificates.ends()
    for each in made:
        print(f"made {certificates.folder / each}: until {ends[each]:%Y-%m-%d}")
    if not made:
        first = min((each for each in ends if each != "authority"), key=ends.__getitem__)
        print(f"nothing to make; the first to end is {certificates.folder / first}, on {ends[first]:%Y-%m-%d}")
    if ends["authority"] - certificates.now < timedelta(days=certificates.days):
        print(
            f"the authority ends on {ends['authority']:%Y-%m-%d}, and all certificates with it: replace it by --rotate",
            file=sys.stderr,
        )


def _name(given: str) -> tuple[str, str]:
    service, separator, name = given.partition("=")
    if not separator or service not in SERVICES:
        near = did_you_mean(service, SERVICES)
        raise argparse.ArgumentTypeError(f"expected SERVICE=NAME, with a service of {', '.join(SERVICES)}{near}")
    try:
        general_name(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return service, name


def _other(given: str) -> str:
    if "/" in given or given.startswith(("urn:", ".")):
        raise argparse.ArgumentTypeError(f"{given!r} is no host name and no IP address")
    try:
        general_name(given)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return given


def _days(given: str) -> int:
    if not given.isdecimal() or not 1 <= int(given) <= AUTHORITY_DAYS:
        raise argparse.ArgumentTypeError(f"expected 1 to {AUTHORITY_DAYS:,} days, not {given!r}")
    return int(given)


if __name__ == "__main__":
    main()
