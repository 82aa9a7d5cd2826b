"""The trainer: runs, and the learners that they train.

A caller starts and watches runs over gRPC: `RunClient(Endpoint("127.0.0.1:50054"))`, with `RunSettings`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
