"""python -m parse: an answer and its history in a terminal."""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import parse
from eval.tasks import ledger
from parse import Generation, Segment, Stats
from parse.__main__ import main, transcript
from parse.options import message_of
from tests.conftest import MODELS

RESULT = Generation(
    "a c",
    [1, 2],
    "stop",
    [
        Segment("a", "draft", 0.91, True),
        Segment(" b", "draft", 0.2, False),
        Segment(" c", "target", None, True),
    ],
    Stats(draft_tokens=2, accepted_tokens=1, target_tokens=1, rounds=1),
)
QUESTION = (
    "list : #1 fig rome 4 ; #2 tea oslo 7 ; #3 jam paris 2 ; #4 egg lima 9 ; #5 rope cairo 1 ; #6 pear genoa 3 ; "
    "#7 lamp delhi 6 ."
)
TARGET = ["--target", str(MODELS / "ledger-target")]
ALONE = [*TARGET, "--method", "target"]
PAIR = [*TARGET, "--draft", str(MODELS / "ledger-draft"), "--verifier", "prompt"]


def besides_prompts(said):
    """What is said but that the pair was not made for a prompt."""
    return [line for line in said.splitlines() if "made for" not in line and "know all words" not in line]


def test_the_transcript_without_colour():
    lines = transcript(RESULT, colour=False).splitlines()
    assert lines[0].split() == ["0.91", "draft", "a"]
    assert lines[1].split() == ["0.20", "draft", "[-b-]"]
    assert lines[2].split() == ["target", "{+c+}"]
    assert "1 of 2 draft tokens accepted" in lines[-1]


def test_the_transcript_in_colour():
    text = transcript(RESULT, colour=True)
    assert "\033[32ma\033[0m" in text
    assert "\033[9;31mb\033[0m" in text
    assert "\033[34mc\033[0m" in text


# models that are named


def objects(capsys) -> list[dict]:
    """The lines of JSON that were printed, and nothing else was."""
    printed = capsys.readouterr()
    assert not besides_prompts(printed.err)
    return [json.loads(line) for line in printed.out.splitlines()]


def test_an_answer_alone_stands_on_standard_output(capsys):
    assert main([QUESTION, *PAIR, "--threshold", "0.5"]) == 0
    printed = capsys.readouterr()
    assert not besides_prompts(printed.err)
    assert printed.out.split("\n\n")[1] in printed.out
    assert ledger.check(QUESTION, printed.out.split("\n\n")[1])
    assert "127 of 127 draft tokens accepted" in printed.out


def test_json_has_all_of_an_answer(capsys):
    assert main([QUESTION, *PAIR, "--threshold", "2", "--json"]) == 0
    (line,) = objects(capsys)
    assert set(line) == {"prompt", "text", "token_ids", "finish_reason", "segments", "stats", "error"}
    assert line["prompt"] == QUESTION
    assert line["finish_reason"] == "stop"
    assert line["stats"]["accepted_tokens"] == 0
    assert "".join(segment["text"] for segment in line["segments"] if segment["accepted"]) == line["text"]
    assert main([QUESTION, *ALONE, "--json"]) == 0
    assert objects(capsys)[0]["text"] == line["text"]  # a threshold above 1 leaves the target's own answer


def test_settings_reach_the_engine(capsys):
    def answer(*words: str) -> dict:
        assert main([QUESTION, *PAIR, "--json", "--threshold", "0", "--max-new-tokens", "24", *words]) == 0
        return objects(capsys)[0]

    assert answer()["stats"]["rounds"] == 1
    assert answer("--horizon", "6")["stats"]["rounds"] == 4
    assert len(answer("--segments", "4", "--max-new-tokens", "12")["segments"]) == 3
    assert len(answer("--segments", "4", "--policy", "whole")["segments"]) == 1
    assert answer("--threshold", "2", "--handback", "never")["stats"]["rounds"] == 1
    assert answer("--threshold", "2")["stats"]["rounds"] == 2
    sampled = [answer("--temperature", "1.5", "--seed", seed)["text"] for seed in "112"]
    assert sampled[0] == sampled[1] != sampled[2]
    assert answer("--temperature", "1.5", "--seed", "1", "--top-k", "1")["text"] == answer()["text"]
    assert answer("--temperature", "1.5", "--seed", "1", "--top-p", "1e-9")["text"] == answer()["text"]
    proposed = answer("--method", "target", "--lookahead", "4")
    assert proposed["text"] == answer("--method", "target")["text"]


def test_several_prompts_are_answered_in_their_order(capsys, tmp_path, monkeypatch):
    other = QUESTION.replace("lima", "kyoto")
    turns = [{"role": "user", "content": other}]
    rows = [other, "", json.dumps({"prompt": QUESTION}), json.dumps({"messages": turns}, ensure_ascii=False)]
    (tmp_path / "rows").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode())
    assert main([QUESTION, "--file", str(tmp_path / "rows"), *ALONE, "--json", "--batch-size", "2"]) == 0
    lines = objects(capsys)
    assert [line["prompt"] for line in lines] == [QUESTION, other, QUESTION, turns]
    assert [line["text"] for line in lines[:2]] == [line["text"] for line in lines[2:]]
    assert all(ledger.check(prompt, line["text"]) for prompt, line in zip((QUESTION, other), lines, strict=False))

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{QUESTION}\n{other}\n".encode())))
    assert main([*ALONE]) == 0
    printed = capsys.readouterr().out
    assert [line[2:] for line in printed.splitlines() if line.startswith(">")] == [QUESTION, other]
    assert lines[1]["text"] in printed


def test_a_character_that_divides_lines_elsewhere_is_text_here(capsys, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a\u2028b\u0085c"}, ensure_ascii=False) + "\n")
    assert main(["--file", str(tmp_path / "rows.jsonl"), *ALONE, "--json", "--max-new-tokens", "1"]) == 0
    assert objects(capsys)[0]["prompt"] == "a\u2028b\u0085c"


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["q"], ["no target is named", "give --run FOLDER"]),
        (["q", *TARGET], ["no draft is named"]),
        (["q", *TARGET, "--draft", str(MODELS / "ledger-draft")], ["no verifier is named"]),
        (["q", "--run", "nowhere"], ["--run nowhere", "no recipe.yaml there"]),
        (["q", "--run", "recipes/quickstart.yaml"], ["--run recipes/quickstart.yaml", "no recipe.yaml there"]),
        (
            ["q", "--target", "recipes/models/ledger", "--method", "target"],
            ["--target 'recipes/models/ledger'", "gpt2"],
        ),
        (["q", "--target", "../x", "--method", "target"], ["--target '../x'", "no such folder"]),
        (["q", *TARGET, "--draft", "recipes/", "--verifier", "prompt"], ["--draft 'recipes/'", "no config.json"]),
        (["q", *TARGET, "--draft", "a/b/c", "--verifier", "prompt"], ["--draft 'a/b/c'", "a hub id such as"]),
        (["q", *PAIR, "--verifier", "promt"], ["--verifier 'promt'", '"prompt", "likelihood"']),
        (["q", *PAIR, "--verifier", "recipes"], ["--verifier 'recipes'", "verifier.json"]),
        (["q", *PAIR, "--policy", "longst"], ["policy='longst'", "first_fail, longest, whole"]),
        (["q", *PAIR, "--method", "x"], ["method='x'", "parse, target, draft"]),
        (["q", *PAIR, "--handback", "x"], ["handback='x'", "segment, never"]),
        (["q", *PAIR, "--horizon", "0"], ["horizon=0"]),
        (["q", *PAIR, "--segments", "0"], ["segments=0"]),
        (["q", *PAIR, "--segments", "word"], ["segments='word'", '"sentence", "line"']),
        (["q", *PAIR, "--top-p", "2"], ["top_p=2.0"]),
        (["a \ud800", *PAIR], ["prompt 1 is no valid Unicode text"]),
        (["--file", "recipes/none.txt", *PAIR], ["--file recipes/none.txt: No such file"]),
        (["--file", "recipes", *PAIR], ["--file recipes: Is a directory"]),
        (["--file", "recipes/models/ledger-draft/model.safetensors", *PAIR], ["is no text in UTF-8"]),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_loaded(capsys, monkeypatch, words, messages):
    monkeypatch.setattr("parse.local.loading.AutoModelForCausalLM.from_pretrained", None)
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    for message in messages:
        assert message in printed.err


@pytest.mark.parametrize(
    "words",
    [["--batch-size", "0"], ["--batch-size", "x"], ["--top-k", "x"], ["--temperatur", "1"], ["--max-new-tokens"]],
)
def test_a_command_line_that_cannot_be_read_takes_one_line(capsys, words):
    with pytest.raises(SystemExit) as stopped:
        main(["q", *PAIR, *words])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "q"', "line 2 begins with { and is no JSON object"),
        ("{" + '"a":' + "[" * 100000, "line 2 begins with { and is no JSON object"),
        ('{"text": "q"}', "its keys are text"),
        ("{}", "its keys are none"),
        ('{"prompt": null}', 'line 2 must hold either "prompt", a text'),
        ('{"prompt": "q", "messages": []}', "its keys are prompt, messages"),
        ('{"messages": []}', 'or "messages", a list of turns'),
        ('{"messages": ["q"]}', 'or "messages", a list of turns'),
    ],
)
def test_a_line_that_is_no_prompt_is_named(capsys, tmp_path, line, message):
    (tmp_path / "rows").write_text(f"q\n{line}\n")
    assert main(["--file", str(tmp_path / "rows"), *ALONE]) == 2
    assert message in capsys.readouterr().err


def test_without_a_prompt(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert main(ALONE) == 2
    assert "no prompt is given" in capsys.readouterr().err


def test_a_hub_id_without_a_slash_is_asked_for(capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["q", "--target", "gpt2-of-nobody", "--method", "target"]) == 2
    assert "--target 'gpt2-of-nobody': no such folder is here, and the hub does not give it" in capsys.readouterr().err


def test_too_little_memory_is_told_from_a_fault_of_ours():
    assert "lower --batch-size" in message_of(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert "lower --batch-size" in message_of(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert "lower --batch-size" in message_of(MemoryError())
    assert message_of(KeyError("a fault of ours")) is None


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_damaged_model_is_named(capsys, tmp_path, file):
    folder = tmp_path / "target"
    shutil.copytree(MODELS / "ledger-target", folder)
    os.truncate(folder / file, (folder / file).stat().st_size // 2)
    assert main(["q", "--target", str(folder), "--method", "target"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert str(folder) in error


def test_an_interrupted_answer_ends_quietly(capsys, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("parse.__main__._answer", interrupted)
    assert main(["q"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_reader_that_has_gone_ends_it_quietly(capsys, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["q", *ALONE, "--max-new-tokens", "1"]) == 141
    assert not besides_prompts(capsys.readouterr().err)


def test_help_and_the_public_names_wait_for_no_library():
    code = (
        "import sys, parse, parse.__main__ as command\n"
        "try: command.main(['--help'])\n"
        "except SystemExit: assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys(), 'imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    assert {"Engine", "Generation", "Segment", "Stats"} == set(parse.__all__) <= set(dir(parse))
    assert parse.Engine.__module__ == "parse.engine"
    with pytest.raises(AttributeError, match="module 'parse' has no attribute 'Engin'"):
        _ = parse.Engin
