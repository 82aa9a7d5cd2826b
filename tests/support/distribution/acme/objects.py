"""The same plug-ins as objects: an entry point may name an attribute of a module."""

from __future__ import annotations

from types import SimpleNamespace

from . import backwards, ever, halved, persistent

algorithm = SimpleNamespace(
    Settings=persistent.Settings, play=persistent.play, train=persistent.train, NEEDS=persistent.NEEDS
)
estimator = SimpleNamespace(Settings=halved.Settings, estimate=halved.estimate)
sampler = SimpleNamespace(Settings=backwards.Settings, choose=backwards.choose)
protocol = SimpleNamespace(Settings=ever.Settings, run=ever.run)
