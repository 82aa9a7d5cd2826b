"""The built-in embedders, a module each. docs/architecture.md says what one exports."""

from mulligan.common.plugins import Plugins
from mulligan.memory.embedder import EmbedderSettings

EMBEDDERS = Plugins("embedder", __name__, "mulligan.embedders", ("Settings", "create"), settings=EmbedderSettings)
