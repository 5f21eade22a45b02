"""Rows of measurements and the file that keeps them."""

from __future__ import annotations

import csv

import pytest
from command_lines import committed

from benchmarks.report.rows import ResultsFile, Row, command_of, commit, read

FACTS = {"machine": "a, b", "commit": "c0ffee", "date": "2000-01-01"}
TIMED = Row("T1", "ours", "forward", 2.0, 1.5, 2.5, 7, 1.0, 0.5, 0.25, 12.0, 1.25)
FAILED = Row("T1", "flex", "forward", note="RuntimeError: no, such kernel")


@pytest.fixture
def results_file(tmp_path):
    return ResultsFile(tmp_path / "rows.csv", FACTS)


def test_rows_and_facts_come_back_from_the_file(results_file):
    assert read(results_file.path) == ([], {})
    for row in (TIMED, FAILED):
        results_file.add(row)
    assert read(results_file.path) == ([TIMED, FAILED], FACTS)


def test_file_without_a_newer_column_is_read_and_gone_on_with(results_file):
    results_file.add(TIMED)
    with results_file.path.open(newline="") as file:
        lines = list(csv.reader(file))
    newer = lines[0].index("error")
    with results_file.path.open("w", newline="") as file:
        csv.writer(file).writerows(line[:newer] + line[newer + 1 :] for line in lines)
    resumed = ResultsFile(results_file.path, FACTS | {"command": "newer"}, resume=True)
    assert resumed.rows == [TIMED._replace(error=None)]
    resumed.add(FAILED)
    assert read(results_file.path) == ([TIMED._replace(error=None), FAILED], FACTS)


def test_file_has_each_median_beside_ours(results_file):
    peer = TIMED._replace(provider="sdpa", median_us=5.0)
    for row in (TIMED, peer, FAILED, peer._replace(case="T2")):  # of T2 there is none of ours
        results_file.add(row)
    with results_file.path.open(newline="") as file:
        assert [line["ratio_to_ours"] for line in csv.DictReader(file)] == ["1", "2.5", "", ""]


def test_rows_of_another_commit_are_not_gone_on_with(results_file):
    results_file.add(TIMED)
    with pytest.raises(ValueError, match="commit c0ffee, this is decaf: measure into another"):
        ResultsFile(results_file.path, FACTS | {"commit": "decaf"}, resume=True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--threads", "2", "--csv", "x.csv"],
        ["--csv=x.csv", "--threads", "2", "--resume"],
        ["--resume", "--threads", "2"],
    ],
    ids=" ".join,
)
def test_command_says_what_was_measured_and_not_where_it_went(arguments):
    assert command_of("benchmarks.cpu", arguments) == "python -m benchmarks.cpu --threads 2"


def test_commit_is_dirty_only_by_what_can_change_a_time(tmp_path, monkeypatch):
    monkeypatch.delenv("SWIN_KERNELS_COMMIT", raising=False)
    assert commit(tmp_path) == "unknown"  # no repository
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "csrc").mkdir()
    code, rows = tmp_path / "csrc" / "a.h", tmp_path / "benchmarks" / "results" / "a.csv"
    code.write_text("1")
    rows.write_text("1")
    committed(tmp_path)
    clean = commit(tmp_path)
    assert clean not in ("", "unknown")
    rows.write_text("2")
    assert commit(tmp_path) == clean
    code.write_text("2")
    assert commit(tmp_path) == f"{clean}-dirty"
