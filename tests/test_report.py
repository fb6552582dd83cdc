"""The page of an evaluation: what it says, and how it looks in a browser, wide and narrow, light and dark."""

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from eval.__main__ import main as evaluate
from eval.measure import summarize
from eval.methods import Outcome
from eval.report import SHOWN, csv_table, failures, html_report
from eval.sentences import sentence
from eval.tasks import TASKS
from parse import Segment
from tests.test_measure import BAD, END, FIG, TEA, outcome
from tests.test_verifier_report import KINDS
from tests.test_verifier_report import report as verifier_report

SWEEP = [{"threshold": t, "speedup": 3 - t, "accuracy": 0.6 + t / 5} for t in (0.1, 0.5)]
NASTY = "<script>alert(1)</script>"


def figures(speed: float = 2.0) -> tuple[dict, dict]:
    """A summary of three methods at one and eight requests, and the outcomes."""
    target = [outcome([Segment(f"{FIG} {TEA} {END}", "target", None, True)], speed, True, 0, 0, 10)] * 12
    parse = [
        outcome([Segment(FIG, "draft", 0.93, True), Segment(f" {TEA} {END}", "target", None, True)]),
        outcome([Segment(BAD, "draft", 0.9, True)], right=False),
        outcome([Segment(NASTY, "draft", 0.5, False), Segment(FIG, "target", None, True)], accepted=0),
    ] * 4
    outcomes = {"target": target, "draft": [replace(one, seconds=0.1) for one in parse], "parse": parse}
    rows = [summarize(name, some, target, TASKS["ledger"]) for name, some in outcomes.items()]
    summary = {
        "name": "x & y",
        "task": {"name": "ledger", "about": TASKS["ledger"].about},
        "models": {
            "target": {"name": "big", "parameters": 3_200_000, "layers": 12},
            "draft": {"name": "small", "parameters": None, "layers": None},
        },
        "hardware": "2 CPU cores",
        "max_accuracy_loss": 0.01,
        "threshold": 0.9,
        "at_once": 1,
        "methods": rows,
        "concurrency": [{"at_once": 8, "methods": rows}],
        "pair": None,
        "parity": {"draft's prompt": "alike in all of 20 prompts"},
        "sweep": [point | {"by_labels": True, "n": 30} for point in SWEEP],
    }
    return summary, outcomes


def page() -> str:
    """With everything that a page may hold."""
    verifier = verifier_report(KINDS) | {"learning_curve": [{"prompts": 20, "acceptable": 0.5, "loss": 0.2}]}
    return html_report(*figures(), verifier, {"facts": [("commit", "abc")], "recipe": "name: x"})


def test_the_first_sentence_says_what_happened():
    (target, _, parse), most = figures()[0]["methods"], 0.01
    asked = {"max_accuracy_loss": most, "concurrency": []}
    said = sentence(asked | {"methods": [target, parse]})
    assert said.startswith(
        "PARSE answered 2.0 times as fast as the target alone; 66.7% of its answers were right, and "
    )
    assert "100.0% of the target's: worse by more than the promised 1 point (95% interval of the difference: -6" in said
    same = sentence({**asked, "max_accuracy_loss": 0.02, "methods": [target, parse | {"non_inferiority": "open"}]})
    assert "12 prompts cannot tell whether it loses more than the promised 2 points" in same
    shown = sentence(asked | {"methods": [target, parse | {"non_inferiority": "shown"}]})
    assert "not worse by more than" in shown
    assert sentence(asked | {"methods": [target]}) == ""
    loads = {"concurrency": [{"at_once": 8, "methods": [target, parse | {"speedup": 1.25}]}]}
    assert sentence(asked | {"methods": [target, parse]} | loads).startswith(
        "PARSE answered 2.0 times as fast as the target alone (1.2 times with 8 requests at once); "
    )


def test_the_next_sentences_say_of_which_models_what_was_faster_and_how_long_one_waits():
    summary, outcomes = figures()
    rows = [row | {"first_token_seconds": 0.4} if row["name"] == "parse" else row for row in summary["methods"]]
    made = html_report(summary | {"methods": rows, "concurrency": [{"at_once": 8, "methods": rows}]}, outcomes)
    assert (
        "and continues from there. The task is ledger (a numbered list of purchases, told in sentences with a running "
        "total); the " in made
    )
    assert (
        "target big (3.2 million parameters in 12 layers) and the draft small answered. Models so small show that"
        in made
    )
    assert (
        "No less accurate than PARSE, and faster: draft with one request at a time (20.0 times as fast as the target), "
        "draft with 8 requests at once (20.0 times as fast as the target)."
    ) in made
    waits = "0.40 s instead of 0.30 s"
    assert f"its first word came after {waits} with one request at a time, {waits} with 8 requests at once." in made
    large = {"target": {"name": "big", "parameters": 8_000_000_000, "layers": 36}}
    worse = [row | ({"accuracy": 0.1} if row["name"] == "draft" else {}) for row in summary["methods"]]
    worse = [row | ({"speedup": 0.5} if row["name"] == "parse" else {}) for row in worse]  # than the target, too
    own = {"models": large, "task": {"name": "my.jsonl", "about": ""}, "methods": worse, "concurrency": []}
    made = html_report(summary | own, outcomes)
    assert "The task is my.jsonl; the target big (8 billion parameters in 36 layers) answered." in made
    assert "Models so small" not in made
    assert "No less accurate" not in made
    assert "shows nothing" not in made
    older = {key: value for key, value in summary.items() if key not in ("task", "models")}
    assert "The task is" not in html_report(older, outcomes)


def test_a_failed_request_has_the_number_of_its_transcript():
    summary, outcomes = figures()
    rows = [row | {"failures": [{"prompt": 1, "error": "ValueError: full"}]} for row in summary["methods"][-1:]]
    assert failures(rows) == [["parse", "2", "ValueError: full"]]
    assert "Prompt 2: wrong, 1.00 s" in html_report(summary, outcomes)


def test_agreement_is_not_called_right():
    """Where answers are compared with the target's own, those of the target are right by construction."""
    (target, _, parse) = figures()[0]["methods"]
    judge = {"by": "me", "same_called_different": 0.25, "different_called_same": 0.5}
    summary = {"max_accuracy_loss": 0.01, "concurrency": [], "methods": [target, parse], "judge": judge}
    said = sentence(summary)
    assert "66.7% of its answers say the same as the target's own, as me judges, who calls 25% of equal answers" in said
    assert "different and 50% of different ones the same; 100.0% of the target's came to an end: worse by" in said
    judge |= {"same_called_different": None, "different_called_same": None}
    assert "as me judges; 100.0%" in sentence(summary)


def test_the_page_is_one_file_that_escapes_what_models_write():
    made = page()
    assert NASTY not in made
    assert "x &amp; y" in made
    assert made.count("<svg") == 7  # four of the methods, three of the verifiers
    assert "<h2>8 requests at once</h2>" in made
    assert "http" not in made
    assert not re.search(r"""(src|href)=["'][^#]""", made)


def test_a_filter_shows_all_of_its_kind_that_are_on_the_page():
    """Also those that are there for another reason; and says how many there are in all."""
    summary, outcomes = figures()
    wrong = [replace(one, right=False, seconds=float(n)) for n, one in enumerate(outcomes["parse"] * 4)]
    made = html_report(summary, {"parse": wrong, "target": outcomes["target"] * 4})
    shown = re.findall(r'data-kinds="([^"]+)"', made)
    assert all("wrong" in kinds.split() for kinds in shown)
    assert f"wrong answers ({len(shown)} of {len(wrong)})" in made
    assert f"the slowest ({SHOWN} of {SHOWN})" in made
    assert sum("slow" in kinds.split() for kinds in shown) == SHOWN


def test_a_page_without_a_verifier_a_sweep_or_other_loads():
    summary, outcomes = figures()
    summary |= {"concurrency": [], "sweep": [], "threshold": None, "methods": summary["methods"][:1]}
    made = html_report(summary, {"target": outcomes["target"]})
    assert made.count("<svg") == 2
    assert "Transcripts" not in made


def test_the_summary_as_csv_has_a_row_for_each_method_and_load():
    summary, _ = figures()
    rows = list(csv.DictReader(io.StringIO(csv_table(summary))))
    assert [(row["at_once"], row["name"]) for row in rows] == [
        (load, name) for load in "18" for name in ("target", "draft", "parse")
    ]
    assert float(rows[2]["speedup_ci95_low"]) == summary["methods"][2]["speedup_ci95"][0]
    assert float(rows[2]["seconds_verify"]) == pytest.approx(0.1)
    assert rows[0]["accepted_fraction"] == ""


def evaluated(folder: Path, speed: float, loads: tuple[int, ...] = (8,)) -> Path:
    """A run's folder with what its evaluation and its verifier wrote."""
    summary, outcomes = figures(speed)
    summary["concurrency"] = [one for one in summary["concurrency"] if one["at_once"] in loads]
    summary["verifier"] = str(folder / "verifier")
    for name in ("eval", "verifier"):
        (folder / name).mkdir(parents=True)
    (folder / "eval" / "summary.json").write_text(json.dumps(summary))
    rows = [{"method": name, **one.record} for name, some in outcomes.items() for one in some]
    (folder / "eval" / "transcripts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = verifier_report(KINDS) | {"chosen": "probe"}
    (folder / "verifier" / "report.json").write_text(json.dumps(found))
    return folder


def test_runs_are_compared_side_by_side(tmp_path, capsys):
    folders = [evaluated(tmp_path / "one", 2.0), evaluated(tmp_path / "other", 3.0, loads=())]
    out = tmp_path / "new" / "page.html"
    assert evaluate(["compare", *map(str, folders), "--out", str(out)]) == 0
    first, second = capsys.readouterr().out.split("Side by side: 8 requests at once")
    rows = [[line.split() for line in text.splitlines()] for text in (first, second)]
    assert ["parse", "66.7%", "2.00x", "66.7%", "3.00x"] in rows[0]
    assert ["parse", "66.7%", "2.00x", "-", "-"] in rows[1]
    assert "measured on 12 prompts 12 prompts".split() in rows[0]
    made = out.read_text()
    assert made.count("<svg") == 7 + 6  # every picture of both runs, less throughput where there is one load
    for title in (": one request at a time", ": verifiers", ": parity of training and serving"):
        assert all(f"<h2>{folder}{title}</h2>" in made for folder in folders)
    assert f"{folders[1]}: wrong answers (" in made  # a filter of its own
    assert set(re.findall(r'data-kinds="[^"]*wrong-(\d)', made)) == {"0", "1"}


def test_an_outcome_is_what_its_record_says():
    _, outcomes = figures()
    for one in [*outcomes["parse"], replace(outcomes["parse"][0], error="gone")]:
        assert Outcome.of_record(json.loads(json.dumps(one.record))) == one


def test_runs_that_cannot_be_compared_are_refused(tmp_path, capsys):
    assert evaluate(["compare", str(tmp_path)]) == 2
    assert "name run folders that `python -m eval` wrote" in capsys.readouterr().err
    folder = evaluated(tmp_path / "old", 2.0)
    summary = json.loads((folder / "eval" / "summary.json").read_text())
    del summary["methods"][0]["lookahead_accepted_fraction"]
    (folder / "eval" / "summary.json").write_text(json.dumps(summary))
    out = tmp_path / "page.html"
    assert evaluate(["compare", str(folder), "--out", str(out)]) == 2
    assert "was evaluated by another version (KeyError('lookahead_accepted_fraction'))" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("width", "scheme", "runs"),
    [(1200, "light", 1), (1200, "dark", 1), (390, "light", 1), (390, "dark", 1), (390, "light", 2)],
)
def test_the_page_in_a_browser(browser, tmp_path, width, scheme, runs):
    """Of one run, and of two side by side.

    No overflow, no error, no request; contrast, names and headings as axe-core wants them; the filter filters.
    """
    from axe_playwright_python.sync_playwright import Axe

    file = tmp_path / "report.html"
    file.write_text(page())
    if runs > 1:
        folders = [str(evaluated(tmp_path / f"a-run-with-a-long-name-{i}", 2.0)) for i in range(runs)]
        assert evaluate(["compare", *folders, "--out", str(file)]) == 0
    view = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    messages, requests = [], []
    view.on("console", lambda message: messages.append(message.text))
    view.on("pageerror", lambda error: messages.append(str(error)))
    view.on("request", lambda request: requests.append(request.url))
    view.goto(file.as_uri())
    for one in view.locator("details").all():
        one.evaluate("one => one.open = true")
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    assert [one["id"] for one in Axe().run(view).response["violations"]] == []
    every = view.locator(".transcript:visible").count()
    view.locator("#filter").select_option("wrong" if runs == 1 else "wrong-1")
    assert 0 < view.locator(".transcript:visible").count() < every
    assert messages == []
    assert requests == [file.as_uri()]
    view.close()
