"""The benchmark: its figures are there, and its scripted drafts are accepted as the script says."""

import json
import math

import pytest
import torch

from eval.bench import Scripted, main
from parse import Engine


@pytest.mark.slow
def test_the_benchmark_prints_a_table_and_one_json_line(capsys):
    assert main(["engine", "--models", "embedded", "--repeats", "1", "--prompts", "1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = json.loads(printed[-1])["rows"]
    passes = [row for row in rows if "N" in row]
    keys = ("verify_over_prefill", "verify_over_equal_prefill", "sequential_over_verify")
    assert {(row["N"], row["K"], row["S"]) for row in passes} == {(128, 8, 1), (128, 8, 4), (256, 16, 1), (256, 16, 4)}
    assert all(math.isfinite(row[key]) and row[key] > 0 for row in passes for key in keys)
    whole = next(row for row in rows if "profile" in row)
    assert whole["decode_over_generate"] > 0
    assert 0 < whole["model_time_fraction"] <= 1
    assert sum(whole["profile"].values()) == pytest.approx(1, abs=0.05)
    assert any("wall time by phase" in line for line in printed)


def test_a_script_decides_what_is_accepted(target, draft, tokenizer):
    engine = Engine(target, tokenizer, draft, tokenizer, Scripted(0.5, [7, 8]), segments=4)
    result = engine.generate("list : #1 fig rome 4 .", 16, handback="never")[0]
    drafted = [segment for segment in result.segments if segment.source == "draft"]
    assert [segment.accepted for segment in drafted] == [True, True, False, False]
    evidence = type("Evidence", (), {"ends": [1, 2, 3, 4]})
    assert torch.equal(Scripted(0.75, []).confidences(evidence), torch.tensor([1.0, 1.0, 1.0, 0.0]))
