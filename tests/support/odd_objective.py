"""A module that is no objective, though it has the names of one."""

Inputs = dict


def loss() -> None: ...
