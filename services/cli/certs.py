"""`mulligan certs`: a private authority and certificates for TLS between the services."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from mulligan.cli.out import fail, note, show
from mulligan.common.config import SERVICES
from mulligan.common.suggest import did_you_mean

_STEPS = ("trust", "issue", "retire")
_NEXT = {
    "trust": "Give all services and callers their new ca.crt; then --rotate issue.",
    "issue": "Give all services and callers their new tls.crt and tls.key; then --rotate retire.",
    "retire": "Give all services and callers their new ca.crt; then nothing of the old authority is left.",
}


def certs(
    folder: Annotated[Path, typer.Argument(help="Where the files are, and are made where they are missing.")],
    name: Annotated[
        list[str] | None,
        typer.Option(help="SERVICE=NAME, a further host name or IP address of a service; may be given again."),
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long new certificates last.")] = 365,
    group: Annotated[
        bool, typer.Option("--group", help="Let the group read the files, but for those of the authority.")
    ] = False,
    rotate: Annotated[
        str,
        typer.Option(help="A step of the replacement of the authority: trust, issue, then retire (docs/security.md)."),
    ] = "",
) -> None:
    """Makes a private authority, a certificate for each service, and one for callers of each role.

    Called again, it makes those again that end soon or that are damaged, and leaves the others as they are. FOLDER has
    `authority`, whose key nobody else needs; `services/NAME` and `clients/ROLE`, each with tls.crt, tls.key and ca.crt.
    """
    from mulligan.cli.certificates import Certificates, RotationStep

    if rotate and rotate not in _STEPS:
        fail(f"--rotate {rotate}: no such step{did_you_mean(rotate, _STEPS)}; there are {', '.join(_STEPS)}", 2)
    certificates = Certificates(folder, _names(name or []), days, group)
    made = certificates.update(RotationStep(rotate) if rotate else None)  # raises OSError, which is one line
    ends = certificates.ends()
    for each in made:
        show(f"made {folder / each}: until {ends[each]:%Y-%m-%d}")
    if not made:
        first = min((each for each in ends if each != "authority"), key=ends.__getitem__)
        show(f"nothing to make: {folder / first} is the first to end, on {ends[first]:%Y-%m-%d}")
    if ends["authority"] - certificates.now < timedelta(days=days):
        note(
            f"the authority ends on {ends['authority']:%Y-%m-%d}, and all certificates with it: replace it by --rotate"
        )
    if rotate:
        note(_NEXT[rotate])


def _names(given: list[str]) -> dict[str, list[str]]:
    from mulligan.cli.certificates import general_name

    found: dict[str, list[str]] = {}
    for each in given:
        service, separator, name = each.partition("=")
        if not separator or service not in SERVICES:
            near = did_you_mean(service, SERVICES)
            fail(f"--name {each}: expected SERVICE=NAME, where SERVICE is one of {', '.join(SERVICES)}{near}", 2)
        try:
            general_name(name)
        except ValueError as error:
            fail(f"--name {each}: {error}", 2)
        found.setdefault(service, []).append(name)
    return found
