"""What installs an extra of this distribution, which is on no package index."""

from __future__ import annotations


def how_to_install(extra: str) -> str:
    return f"in a checkout of Mulligan, pip install -e '.[{extra}]'; with its wheel, pip install 'FILE.whl[{extra}]'"
