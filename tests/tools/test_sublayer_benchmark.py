"""The table of both sublayers at toy sizes."""

from __future__ import annotations

import pytest

from benchmarks import sublayers


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    monkeypatch.setattr(sublayers, "STAGES", {96: (14, 3), 768: (7, 2)})


def test_table_has_a_line_for_each_half_and_width(capsys):
    assert sublayers.main(["--batch", "1", "--rounds", "1", "--channels", "96"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [line.split()[:2] for line in lines if "sublayer " in line]
    assert found == [["mlp_sublayer", "96"], ["window_attention_sublayer", "96"]]
    assert all("–" not in line for line in lines if "sublayer " in line)


def test_results_that_break_the_error_rule_have_no_time(capsys, monkeypatch):
    def wrong(*_):
        raise AssertionError("output: largest error")

    monkeypatch.setattr(sublayers.mlp, "check_mlp", wrong)
    sublayers.main(["--batch", "1", "--rounds", "1", "--channels", "96"])
    (line,) = (x for x in capsys.readouterr().out.splitlines() if "mlp_sublayer " in x)
    assert "–" in line
    assert "output: largest error" in line
