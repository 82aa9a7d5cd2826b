"""The built-in stores, a module or a package each. docs/architecture.md says what one exports."""

from mulligan.common.plugins import Plugins
from mulligan.memory.store import StoreSettings

STORES = Plugins("store", __name__, "mulligan.stores", ("Settings", "open"), "sqlite", StoreSettings)
