"""Mulligan: gRPC services in which language agents learn by experience.

`mulligan.env`, `mulligan.policy`, `mulligan.memory` and `mulligan.trainer` have what the authors of environments,
backends and stores need, and a client of each service. Here is what the services share: addresses, errors, messages,
samples, experiences. Everything else is internal and may change.

A module loads when one of its names is used: `import mulligan` brings neither torch nor gRPC.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
