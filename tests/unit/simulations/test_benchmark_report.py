import io
import json

from rich.console import Console

from simulations.benchmarks.report import as_json, as_table, row_at_most


def test_a_row_within_its_limit_meets_its_target_and_tells_the_advantage() -> None:
    row = row_at_most("empty round", 0.05, "s", limit=0.1, reference=6.0)
    assert (row.ok, row.ratio, row.target) == (True, 120.0, "<= 0.1 s")


def test_a_row_beyond_its_limit_does_not() -> None:
    row = row_at_most("empty round", 0.2, "s", limit=0.1)
    assert (row.ok, row.ratio, row.reference) == (False, None, None)


def test_programs_get_one_object_with_all_fields() -> None:
    rows = [row_at_most("cost", 3.5, "ms", limit=4)]
    assert json.loads(as_json("rounds", "a machine", rows)) == {
        "bench": "rounds",
        "machine": "a machine",
        "rows": [
            {
                "name": "cost",
                "value": 3.5,
                "unit": "ms",
                "reference": None,
                "ratio": None,
                "target": "<= 4 ms",
                "ok": True,
            }
        ],
    }


def test_people_get_a_table_that_shows_what_missed_its_target() -> None:
    console = Console(width=120, file=io.StringIO(), record=True)
    rows = [row_at_most("slow", 2, "s", limit=1, reference=3), row_at_most("fast", 1, "s", limit=1)]
    console.print(as_table("rounds", rows))
    text = console.export_text()
    assert "NO" in text
    assert "1.5 x" in text
