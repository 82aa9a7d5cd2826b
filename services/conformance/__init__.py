"""Whether an implementation in any language keeps what the contracts in `proto/` promise: `mulligan conformance`.

The author of an environment checks it in a test by `check_environment`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
