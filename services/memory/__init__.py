"""Reflection memory. The author of a store implements `Store`, and exports `Settings` and `open`.

A caller writes and reads over gRPC: `MemoryClient(Endpoint("127.0.0.1:50053"))`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
