"""The check of a GPU: its parts run, fail and end as they should, without one; and its tables are what it measured."""

import json
import math
import subprocess
import sys
from time import sleep

import pytest

from eval import results
from eval.bench import gpu
from eval.bench.__main__ import main
from eval.bench.parts import PARTS, Part
from eval.bench.shared import FULL, TINY, Bench, Rows
from eval.bench.tables import COLUMNS, gpu_tables, markdown_table
from tests.conftest import ROOT

# what a bare machine with torch and transformers lacks
LACKING = "import sys; sys.modules.update(dict.fromkeys(('trl', 'datasets', 'wandb', 'openai', 'math_verify')))\n"
COMMAND = "from eval.bench.__main__ import main; sys.exit(main(sys.argv[1:]))"


def test_every_part_runs_with_tiny_shapes_anywhere_and_needs_little(tmp_path):
    words = [sys.executable, "-c", LACKING + COMMAND, "gpu", "--tiny", "--out", str(tmp_path), "--commit", "abc"]
    ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    record = json.loads((tmp_path / "gpu-tiny.json").read_text())
    assert json.loads(ran.stdout.splitlines()[-1]) == record
    assert list(record["parts"]) == [part.name for part in PARTS]
    assert all(part["error"] is None for part in record["parts"].values())
    assert record["commit"] == "abc"
    rows = [row for part in record["parts"].values() for row in part["rows"]]
    assert {row["table"] for row in rows} == set(COLUMNS)
    for row in rows:
        for key, value in row.items():
            if isinstance(value, float) and key not in ("rest", "accuracy"):
                assert math.isfinite(value), (key, row)
                assert value > 0, (key, row)
    answers = [row for row in rows if row["table"] == "answers"]
    for row in answers:
        if row["way"] == "PARSE":  # what the script says is drafted, up to a segment or two
            assert row["accepted"] == pytest.approx(row["kept"], abs=0.2)
    assert "Whole answers by a script" in ran.stdout
    assert len([line for line in ran.stdout.splitlines() if "] " in line]) > 20  # a line a figure
    assert "No GPU has been measured yet" in results.document(tmp_path)  # tiny shapes are no measurement


def test_parts_of_tiny_models_fill_their_tables_in_this_process_too():
    bench = Bench(TINY, {"parts": {}}, None)
    for part in PARTS:
        if part.name != "tests":
            rows = Rows(part.name, lambda: None)
            part.run(bench, rows)
            bench.record["parts"][part.name] = {"rows": list(rows)}
            assert {row["table"] for row in rows} <= set(COLUMNS)
            assert rows


def test_without_a_gpu_nothing_is_measured(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["gpu", "--out", str(tmp_path / "out")]) == 2
    assert "needs a GPU, and torch sees none here; --tiny runs its parts anywhere" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def _noting(bench: Bench, rows: Rows) -> None:
    rows.note(table="ceilings", bandwidth=3e12, rate=7.9e14)


def _failing(bench: Bench, rows: Rows) -> None:
    _noting(bench, rows)
    raise RuntimeError("no kernel")


def _slow(bench: Bench, rows: Rows) -> None:
    _noting(bench, rows)
    try:
        sleep(30)
    except Exception:  # as compilers and tests do
        sleep(30)


PLAN = (
    Part("failing", "fails", 9.0, _failing),
    Part("slow", "is too slow", 0.2, _slow),
    Part("fine", "works", 9.0, _noting),
)


@pytest.fixture
def planned(monkeypatch):
    monkeypatch.setattr(gpu, "PARTS", PLAN)
    monkeypatch.setattr(gpu.faulthandler, "dump_traceback_later", lambda *_, **__: None)


def test_a_part_that_fails_or_takes_too_long_keeps_its_figures_and_the_next_goes_on(planned, tmp_path, capsys):
    record = gpu.measure(tmp_path, tiny=True, run=None, commit=None)
    assert {name: part["error"] for name, part in record["parts"].items()} == {
        "failing": "RuntimeError: no kernel",
        "slow": "out of time after 0 s",
        "fine": None,
    }
    assert [len(part["rows"]) for part in record["parts"].values()] == [1, 1, 1]
    assert json.loads((tmp_path / "gpu-tiny.json").read_text()) == record
    printed = capsys.readouterr().out
    assert "The part `failing` did not come to its end: RuntimeError: no kernel" in printed
    assert "3.00 TB/s" in printed


def test_the_parts_together_take_no_more_than_their_time(planned, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LIMIT", 0.0)
    record = gpu.measure(tmp_path, tiny=True, run=None, commit=None)
    assert all(part["error"].startswith("out of time") for part in record["parts"].values())
    assert sum(part.limit for part in PARTS) + 30 <= 540  # and half a minute to start


def test_where_the_device_fails_in_this_process_a_fresh_one_goes_on(planned, tmp_path, monkeypatch):
    class Replaced(Exception):
        pass

    words: list[str] = []

    def replace(program: str, command: list[str]) -> None:
        words.extend(command)
        raise Replaced

    monkeypatch.setattr(gpu, "_device_answers", lambda: False)
    monkeypatch.setattr("os.execv", replace)
    with pytest.raises(Replaced):
        gpu.measure(tmp_path, tiny=True, run=None, commit="abc")
    assert list(json.loads((tmp_path / "gpu-tiny.json").read_text())["parts"]) == ["failing"]
    monkeypatch.setattr(gpu, "_device_answers", lambda: True)
    assert main(words[3:]) == 1  # a part failed
    record = json.loads((tmp_path / "gpu-tiny.json").read_text())
    assert list(record["parts"]) == ["failing", "slow", "fine"]
    assert record["commit"] == "abc"


def test_a_measurement_becomes_tables_of_the_document(planned, tmp_path):
    record = gpu.measure(tmp_path, tiny=True, run=None, commit="0123456789abcdef")
    record |= {"tiny": False, "device": "NVIDIA H100"}
    (tmp_path / "gpu-nvidia-h100.json").write_text(json.dumps(record))
    text = results.document(tmp_path)
    assert "### NVIDIA H100" in text
    assert "commit 0123456789ab" in text
    assert "| 3.00 TB/s | 790 TFLOP/s |" in text
    assert "No GPU" not in text
    table = next(table for table in gpu_tables(record) if table.head)
    assert markdown_table(table).splitlines()[2:4] == ["| bandwidth | rate |", "| --- | --- |"]


def test_the_document_is_what_the_files_say():
    assert (ROOT / "docs/results.md").read_text() == results.document(ROOT / "docs/results")


def test_the_shapes_are_those_of_the_models_that_are_named():
    """Parameters of Qwen3-8B and Qwen3-0.6B, by their configurations."""
    for config, expected in ((FULL.target, 8.19e9), (FULL.draft, 0.596e9)):
        hidden, layers, vocabulary = config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]
        heads = config["num_attention_heads"] * config["head_dim"]
        keys = config["num_key_value_heads"] * config["head_dim"]
        layer = 2 * hidden * heads + 2 * hidden * keys + 3 * hidden * config["intermediate_size"]
        embeddings = vocabulary * hidden * (1 if config["tie_word_embeddings"] else 2)
        assert layers * layer + embeddings == pytest.approx(expected, rel=0.01)
