"""Measurements that take too long for the test suite; see `__main__.py`."""


class CaseUnavailable(Exception):
    """A case cannot run here; the message says what is missing."""
