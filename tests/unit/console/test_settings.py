"""Settings as the pages show them."""

from __future__ import annotations

from mulligan.console.settings import differences, flat, grouped

RUN = {"steps": 3, "model": {"source": "embedded", "lora": {"rank": 8}}, "seed": 0, "tracking": {}}


def test_settings_stand_by_table() -> None:
    assert grouped(flat(RUN)) == {
        "": {"steps": "3", "seed": "0", "tracking": "{}"},
        "model": {"source": "embedded", "lora.rank": "8"},
    }
    assert grouped(flat({"model": {"source": "embedded"}})) == {"model": {"source": "embedded"}}
    assert grouped({}) == {}


def test_only_settings_that_differ_are_compared() -> None:
    other = RUN | {"model": {"source": "embedded"}, "steps": 5}
    assert differences([RUN, other]) == [("steps", ["3", "5"]), ("model.lora.rank", ["8", ""])]
    assert differences([RUN, RUN]) == []
