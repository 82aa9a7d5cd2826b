"""Imports what the four services import: for a process from which they are forked."""

import importlib
import sys

for _service in ("env", "policy", "memory", "trainer"):
    importlib.import_module(f"mulligan.{_service}.__main__")
    del sys.modules[f"mulligan.{_service}.__main__"]  # it is yet to be run
for _library in ("torch", "transformers", "peft"):  # services import them when they need them
    importlib.import_module(_library)
