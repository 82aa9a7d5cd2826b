"""Who may see the console, and who may change something with it."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Access:
    """Who may do what. `hosts`: HOST:PORT, as browsers send it. The key is needed for everything; if `is_open`, to
    change something alone. A URL with `?key=…` gives the browser a cookie that has it."""

    hosts: Sequence[str]
    key: str
    port: int
    is_open: bool = False

    @property
    def cookie(self) -> str:
        """Its name: browsers send a cookie to all ports of a host."""
        return f"mulligan-console-{self.port}"

    def is_key(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.key.encode())
