import statistics

import pytest

from llm2comp.lab.evaluation.published import published

ROWS = published()


def test_all_systems_of_the_table():
    assert len(ROWS) == 25
    assert [row.stage for row in ROWS].count("SCL") == 11
    assert len({(row.stage, row.model) for row in ROWS}) == 25
    best = max((row for row in ROWS if row.average), key=lambda row: row.average or 0)
    assert (best.model, best.average, best.samples) == ("LLM2Comp-KL", 66.78, "0.36M")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.stage}-{row.model}")
def test_averages_add_up(row):
    """The printed average is the mean of the 14 printed figures, to the table's rounding."""
    if row.average is None:
        assert (row.model, sorted(row.scores)) == ("RepLLaMA", ["ArguAna", "NFCorpus", "SciFact"])
        return
    assert len(row.scores) == 14
    assert statistics.mean(row.scores.values()) == pytest.approx(row.average, abs=0.01)
