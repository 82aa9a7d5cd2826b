"""Downloads a file over HTTP to a part of it: what is there already is not downloaded again."""

from __future__ import annotations

import time
from collections.abc import Callable
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

_TRIES = 5  # in a row that bring nothing
_PAUSE_SECONDS = 1.0
_TIMEOUT_SECONDS = 30.0  # without a byte
_PIECE = 2**18


class Unavailable(Exception):
    """The file could not be downloaded from there. What came of it stays in its part."""


def resume(url: str, part: Path, size: int, progress: Callable[[int], None]) -> None:
    """Goes on with `part` until it has `size` bytes; `progress` gets how many there are. The content is not checked.

    A connection that breaks is opened again. Raises Unavailable, and OSError where the part cannot be written.
    """
    if not url.startswith(("https://", "http://")):
        raise Unavailable("it is not served over HTTP")
    failures = 0
    while (begin := part.stat().st_size if part.exists() else 0) != size:
        if begin > size:
            part.unlink()
            continue
        cause: Exception | str = "the connection ended early"
        try:
            response = _open(url, begin)
        except (OSError, HTTPException) as error:  # all errors of urllib and of the connection
            if isinstance(error, HTTPError) and error.code < HTTPStatus.INTERNAL_SERVER_ERROR:
                raise Unavailable(f"the server answers {error.code}") from error
            cause = error
        else:
            with response:
                cause = _receive(response, part, begin, size, progress) or cause
        there = part.stat().st_size if part.exists() else 0
        failures = 0 if there > begin else failures + 1
        if failures >= _TRIES:
            raise Unavailable(str(cause))
        if there != size:
            time.sleep(_PAUSE_SECONDS)


def _open(url: str, begin: int) -> HTTPResponse:
    headers = {"Accept-Encoding": "identity"}  # else the bytes may be of a packed file
    if begin:
        headers["Range"] = f"bytes={begin}-"
    response: HTTPResponse = urlopen(Request(url, headers=headers), timeout=_TIMEOUT_SECONDS)
    return response


def _receive(
    response: HTTPResponse, part: Path, begin: int, size: int, progress: Callable[[int], None]
) -> Exception | None:
    """Writes what comes, at most up to `size` bytes. What broke the connection, if that is known."""
    goes_on = response.status == HTTPStatus.PARTIAL_CONTENT and (
        response.headers.get("Content-Range", "").startswith(f"bytes {begin}-")
    )
    there = begin if goes_on else 0  # a server that knows no ranges sends all
    with part.open("ab" if goes_on else "wb") as file:
        while there < size:
            try:
                piece = response.read(min(_PIECE, size - there))
            except (OSError, HTTPException) as error:
                return error
            if not piece:
                return None
            file.write(piece)
            there += len(piece)
            progress(there)
    return None
