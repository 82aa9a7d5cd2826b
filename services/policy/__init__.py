"""Policy inference. The author of a backend implements `Backend`: an engine that samples, scores and takes new weights.
Its module exports a class `Settings` and a function `open`.

A caller samples over gRPC: `PolicyClient(Endpoint("127.0.0.1:50052"))` is a client of one server, `connect` of several.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
