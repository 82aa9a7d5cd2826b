"""Who may see the console, and who may change something with it."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Access:
    """Who may do what. `hosts`: HOST:PORT, as browsers send it. The key is needed to change something, and if
    `for_all`, to see anything. A URL with `?key=…` gives the browser a cookie that has it."""

    hosts: Sequence[str]
    key: str
    port: int
    for_all: bool = False

    @property
    def cookie(self) -> str:
        """Its name: browsers send a cookie to all ports of a host."""
        return f"mulligan-console-{self.port}"

    def is_key(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.key.encode())
