"""The figures of runs that documents show: kept with what they were made with, and written by the command."""

import json

import pytest

from eval import results
from eval.bench import __main__ as command
from eval.bench.tables import Table
from eval.measure import summarize
from eval.tasks import TASKS
from eval.verifier_report import COLUMNS
from parse import Segment
from tests.test_measure import FIG, outcome


@pytest.fixture
def run(tmp_path):
    """A run folder with an evaluation."""
    target = [outcome([Segment(FIG, "target", None, True)], 2.0, True, 0, 0, 10)] * 4
    mine = [outcome([Segment(FIG, "draft", 0.9, True)])] * 4
    rows = [summarize(name, some, target, TASKS["ledger"]) for name, some in (("target", target), ("parse", mine))]
    summary = {"name": "of-mine", "at_once": 1, "methods": rows, "max_accuracy_loss": 0.01}
    summary["concurrency"] = [{"at_once": 8, "methods": rows}]
    made = {"finished": "2026-01-02", "git_commit": "a" * 40, "packages": {"torch": "9"}, "hardware": "2 cores"}
    folder, shipped = tmp_path / "run", tmp_path / "shipped"
    summary["verifier"] = str(shipped)
    shipped.mkdir()
    figures = {key: 0.5 for key, _, _ in COLUMNS} | {"oracle_accepted_fraction": 0.75}
    report = {
        "chosen": "probe",
        "n_prompts": 40,
        "n_prefixes": 90,
        "max_accuracy_loss": 0.01,
        "kinds": {"probe": figures},
    }
    (shipped / "report.json").write_text(json.dumps(report))
    (folder / "eval").mkdir(parents=True)
    (folder / "eval/summary.json").write_text(json.dumps(summary))
    (folder / "recipe.yaml").write_text("engine:\n  lookahead: 12\n")
    (folder / "provenance.json").write_text(json.dumps({"stages": {"eval": {**made, "seconds": 7.0}}}))
    return folder


def test_a_runs_figures_are_kept_with_machine_commit_and_date(run, tmp_path):
    file = results.keep(run, tmp_path / "new")
    assert file.name == "run-of-mine.json"
    text = results.document(tmp_path / "new")
    assert "2026-01-02, commit aaaaaaaaaaaa, 2 cores, torch 9." in text
    assert "4 test prompts, one request at a time, PARSE with a lookahead of 12:" in text
    assert "4 test prompts, 8 requests at once, PARSE with a lookahead of 12:" in text
    assert "Verifiers on 40 test prompts (90 prefixes), 1.0% of accuracy promised; an oracle accepts 75.0%:" in text
    assert "| **PARSE** | 100.0% (51.0% to 100.0%) | +0.0 pt | 2.00x (2.00 to 2.00) | 1.000 s | 0.300 s |" in text


def test_a_document_shows_the_table_of_a_run_that_it_names(run, tmp_path):
    results.keep(run, tmp_path)
    text = results.with_tables("Before\n<!-- of-mine -->\nold\n<!-- end -->\nafter <!-- other --> x", tmp_path)
    assert text.startswith("Before\n<!-- of-mine -->\n4 test prompts")
    assert text.endswith("<!-- end -->\nafter <!-- other --> x")
    assert "old" not in text
    assert results.with_tables(text, tmp_path) == text


def test_a_document_shows_the_sentence_of_a_run_that_it_names(run, tmp_path):
    results.keep(run, tmp_path)
    text = results.with_tables("<!-- of-mine: sentence -->\n<!-- end -->\n<!-- of-mine -->\n<!-- end -->", tmp_path)
    told, table = text.split("<!-- end -->\n")
    assert told.startswith("<!-- of-mine: sentence -->\n> PARSE answered 2.0 times as fast as the target alone (2.0")
    assert table.startswith("<!-- of-mine -->\n4 test prompts")
    assert results.with_tables(text, tmp_path) == text


def test_a_benchmark_leaves_a_file_that_the_document_shows(tmp_path, capsys):
    command._tell("The engine", [Table("Passes", ["a", "b"], [["1", "2.00x"]])], [{"a": 1}], tmp_path / "new")
    assert capsys.readouterr().out.endswith(', "rows": [{"a": 1}]}\n')
    text = results.document(tmp_path / "new")
    assert "## The engine\n" in text
    assert "Passes:\n\n| a | b |\n| --- | --- |\n| 1 | 2.00x |\n" in text


def test_a_run_without_an_evaluation_is_refused(tmp_path, capsys):
    assert results.main([str(tmp_path)]) == 2
    assert "holds no evaluation" in capsys.readouterr().err


def test_the_documents_are_as_the_command_writes_them():
    folder = results.DOCS / "results"
    assert (results.DOCS / "results.md").read_text() == results.document(folder)
    for file in (results.ROOT / "README.md", *results.DOCS.glob("*.md")):
        assert results.with_tables(file.read_text(), folder) == file.read_text()
