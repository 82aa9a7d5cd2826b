"""How the embedded model is made: skills only (reading a legend, writing one), never the hidden assignment itself.

`python -m mulligan.models.recipe --out models/embedded`
"""
