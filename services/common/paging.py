"""Page tokens: opaque to callers, and valid only for the listing that issued them."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json

from mulligan.common.errors import DomainError, Reason

DEFAULT_PAGE_SIZE = 100


def page_token(position: int, *listing: object) -> str:
    """Encodes the position of the next page. `listing` are the arguments of the listing; the next call must repeat
    them."""
    return base64.urlsafe_b64encode(json.dumps([position, _digest(listing)]).encode()).decode()


def page_position(token: str, *listing: object) -> int:
    """Decodes the position; 0 for an empty token. Raises DomainError BAD_PAGE_TOKEN."""
    if not token:
        return 0
    try:
        position, digest = json.loads(base64.b64decode(token, altchars=b"-_", validate=True))
    except (binascii.Error, ValueError, TypeError, RecursionError):
        raise DomainError(Reason.BAD_PAGE_TOKEN, "page_token was not issued by this service") from None
    if not isinstance(position, int) or not 0 <= position < 2**63 or digest != _digest(listing):
        raise DomainError(Reason.BAD_PAGE_TOKEN, "page_token was issued for another listing")
    return position


def _digest(listing: tuple[object, ...]) -> str:
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]
