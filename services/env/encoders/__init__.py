"""The built-in encoders of dense search, a module or a package each. An encoder exports `create(settings)`."""

from mulligan.common.plugins import Plugins

ENCODERS = Plugins("encoder", __name__, "mulligan.encoders", ("create",), default="transformers")
