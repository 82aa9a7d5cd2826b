"""The encoders of dense search that come along, a module or a package each. One exports `create(settings)`."""

from mulligan.common.plugins import Plugins

ENCODERS = Plugins("encoder", __name__, "mulligan.encoders", ("create",), default="transformers")
