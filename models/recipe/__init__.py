"""Trains the embedded model on skills (reading and writing a legend), but never on the hidden assignment itself.

`python -m mulligan.models.recipe --out models/embedded`
"""
