"""Proofs that take too long for the test suite; see `__main__.py`."""


class CaseUnavailable(Exception):
    """What a case needs is not there; the message says what."""
