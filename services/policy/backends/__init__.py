"""The built-in backends, a package each. docs/architecture.md says what one exports."""

from mulligan.common.plugins import Plugins
from mulligan.policy.backend import BackendSettings

BACKENDS = Plugins("backend", __name__, "mulligan.backends", ("Settings", "open"), "transformers", BackendSettings)
