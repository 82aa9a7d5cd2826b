"""Optional dependencies: what is missing and how to install it. This distribution is on no package index."""

from __future__ import annotations


class MissingExtra(Exception):
    """Packages are not installed that something needs; `extra` of this distribution installs them."""

    def __init__(self, extra: str, cause: ImportError) -> None:
        super().__init__(f"needs the extra {extra!r} ({cause}): {how_to_install(extra)}")


def how_to_install(extra: str) -> str:
    return f"in a checkout of Mulligan, pip install -e '.[{extra}]'; with its wheel, pip install 'FILE.whl[{extra}]'"
