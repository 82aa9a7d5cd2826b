"""Environments. An author writes a class with `start` and an episode class with `step`, as `Environment` and `Episode`
say, a dataclass `Settings` and a function `create(name, settings)`; docs/environments.md is the guide.

A caller plays over gRPC: `connect(Endpoint("127.0.0.1:50051"))` is a client of one server or several.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
