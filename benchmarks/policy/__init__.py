"""The policy service against the same engines called directly; see `__main__.py`."""
