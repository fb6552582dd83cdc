"""The target's answers: from the engine, from a server, and what of them is kept."""

import json
import threading

import pytest
from datasets import load_from_disk
from transformers import AutoTokenizer

from eval.server import Answered, Client
from recipes.schema import Server, load_recipe
from tests.conftest import MODELS, OpenAIServer
from train.__main__ import main as train
from train.answers import Encoding

PROMPTS = [
    "list : #1 fig rome 4 ; #2 tea oslo 7 .",
    "list : #1 jam paris 2 .",
    "list : #1 egg lima 9 .",
    "the fig",
    "tea",
]


@pytest.fixture
def recipe(tmp_path):
    """The words of a recipe over five prompts of one's own, all of them to be answered."""
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps({"prompt": prompt, "split": "answers"}) + "\n" for prompt in PROMPTS))
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"name: mine\ntarget: {MODELS}/ledger-target\ndraft: {MODELS}/ledger-draft\ntask: {data}\nruns: {tmp_path}\n"
        "stages: [answers]\nengine: {max_new_tokens: 60}\n"
    )
    return str(file)


def answers_of(recipe):
    folder = load_recipe(recipe).folder / "answers"
    rejected = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    return load_from_disk(folder).to_list(), rejected


def test_answers_from_a_server(recipe, server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sesame")
    words = [f"answers.server={{url: {server.url}, model: big, key_variable: MY_KEY}}"]
    assert train([recipe, *words]) == 0
    rows, rejected = answers_of(recipe)
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "ledger-target")
    assert {row["prompt"] for row in rows} == set(PROMPTS)
    assert not rejected
    for row in rows:
        learnt = [id for id, mask in zip(row["input_ids"], row["completion_mask"], strict=True) if mask]
        assert tokenizer.decode(learnt) == f"that is 11 coins . {tokenizer.eos_token}"
        assert row["right"] is None
    assert {(one["model"], one["key"], one["temperature"], one["max_tokens"]) for one in server.asked} == {
        ("big", "Bearer sesame", 0.0, 60)
    }
    assert "sesame" not in "".join(file.read_text() for file in load_recipe(recipe).folder.glob("*.*"))


def test_a_server_is_asked_what_else_it_knows(recipe, server):
    """Such as vLLM's switch for thinking."""
    extra = "extra_body: {chat_template_kwargs: {enable_thinking: false}}"
    assert train([recipe, f"answers.server={{url: {server.url}, model: big, {extra}}}"]) == 0
    assert [one["chat_template_kwargs"] for one in server.asked] == [{"enable_thinking": False}] * len(PROMPTS)


def test_a_server_is_told_that_an_answer_is_begun(recipe, server):
    """As vLLM is; else it would answer the assistant."""
    begun = [{"role": "user", "content": PROMPTS[0]}, {"role": "assistant", "content": "that is"}]
    client = Client(Server(url=server.url, extra_body={"min_p": 0.1}), "big", 60)
    assert client.answer(PROMPTS[0]).text == "that is 11 coins ."
    server.reply = lambda prompt: (200, {"content": " 11 coins ."}, "stop")
    assert client.answer(begun).text == " 11 coins ."
    server.reply = lambda prompt: (200, {"content": "that is 11 coins ."}, "stop")
    plain, told = server.asked
    assert told["messages"] == begun
    assert (told["continue_final_message"], told["add_generation_prompt"], told["min_p"]) == (True, False, 0.1)
    assert not {"continue_final_message", "add_generation_prompt"} & plain.keys()
    empty = [begun[0], {"role": "assistant", "content": ""}]
    assert client.answer(empty).text == "that is 11 coins ."
    assert server.asked[-1]["messages"] == empty[:1]  # else it would be a turn that is closed


def test_a_server_that_begins_a_begun_answer_anew_is_noticed(server):
    begun = [{"role": "user", "content": PROMPTS[0]}, {"role": "assistant", "content": " that is "}]
    answered = Client(Server(url=server.url), "big", 60).answer(begun)
    assert answered.error == "was begun anew by the server, which knows no continue_final_message"


def test_what_nothing_can_be_learnt_from_is_kept_with_its_reason(recipe, server):
    replies = {
        PROMPTS[0]: (200, {"content": "that is"}, "length"),
        PROMPTS[1]: (400, {}, None),
        PROMPTS[2]: (200, {"content": " "}, "stop"),
        PROMPTS[3]: (200, {"content": "<think> fig </think> "}, "stop"),
        PROMPTS[4]: (200, {"content": "that is 11 coins ."}, "stop"),
    }
    server.reply = replies.get
    words = [f"answers.server={{url: {server.url}, model: big, retries: 0}}", "answers.thinking=drop"]
    assert train([recipe, *words]) == 0
    rows, rejected = answers_of(recipe)
    assert [row["prompt"] for row in rows] == [PROMPTS[4]]
    reasons = {row["prompt"]: row["reason"] for row in rejected}
    assert reasons[PROMPTS[0]] == "did not end within engine.max_new_tokens"
    assert "400" in reasons[PROMPTS[1]]
    assert reasons[PROMPTS[2]] == "is empty"
    assert reasons[PROMPTS[3]] == "is empty without its thinking"


def test_references_are_answers_that_need_no_target(tmp_path, capsys):
    data, file = tmp_path / "mine.jsonl", tmp_path / "mine.yaml"
    rows = [
        {"prompt": prompt, "reference": [f"{i} coins", "other"], "split": "answers"} for i, prompt in enumerate(PROMPTS)
    ]
    file.write_text(
        f"name: mine\ntarget: {MODELS}/ledger-target\ndraft: {MODELS}/ledger-draft\ntask: {data}\nruns: {tmp_path}\n"
        "stages: [answers]\nanswers: {source: references}\nengine: {max_new_tokens: 60}\n"
    )
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train([str(file)]) == 0
    found, rejected = answers_of(str(file))
    assert {row["prompt"]: row["answer"] for row in found} == {row["prompt"]: row["reference"][0] for row in rows}
    assert all(row["right"] for row in found)
    assert not rejected
    assert "by the rows themselves" in capsys.readouterr().out
    data.write_text("".join(json.dumps({"prompt": row["prompt"], "split": "answers"}) + "\n" for row in rows))
    assert train([str(file)]) == 2
    assert "answers.source=references takes them from rows with a `reference`" in capsys.readouterr().err


def test_a_server_that_fails_at_times_is_asked_again(recipe, server):
    failed = set()

    def reply(prompt):
        if prompt in failed:
            return 200, {"content": "that is 11 coins ."}, "stop"
        failed.add(prompt)
        return 503, {}, None

    server.reply = reply
    assert train([recipe, f"answers.server={{url: {server.url}, model: big, retries: 2}}"]) == 0
    assert len(answers_of(recipe)[0]) == 5
    assert len(server.asked) == 10


@pytest.mark.parametrize("status", [500, 502, 429])
def test_failures_are_no_answers(recipe, server, capsys, status):
    """A sick server used to end the stage with every prompt "rejected", and the healthy one was never asked."""
    words = [f"answers.server={{url: {server.url}, model: big, retries: 0}}"]
    server.reply = lambda prompt: (status, {}, None)
    assert train([recipe, *words]) == 2
    said = capsys.readouterr().err
    assert "5 of 5 failed; what is finished is kept, and the next start asks for the rest" in said
    assert f"got the status {status} from the server" in said
    assert not (load_recipe(recipe).folder / "answers").exists()
    server.reply = lambda prompt: (200, {"content": "that is 11 coins ."}, "stop")
    server.asked.clear()
    assert train([recipe, *words]) == 0
    assert len(answers_of(recipe)[0]) == len(server.asked) == 5


def test_a_stage_does_not_end_with_the_few_that_were_answered(recipe, server, capsys):
    words = [f"answers.server={{url: {server.url}, model: big, retries: 0}}"]
    good = (200, {"content": "that is 11 coins ."}, "stop")
    server.reply = lambda prompt: (503, {}, None) if prompt == PROMPTS[1] else good
    assert train([recipe, *words]) == 2
    assert "1 of 5 failed" in capsys.readouterr().err
    server.reply = lambda prompt: good
    server.asked.clear()
    assert train([recipe, *words]) == 0
    assert [asked["messages"][-1]["content"] for asked in server.asked] == [PROMPTS[1]]  # the others are kept


@pytest.mark.parametrize(
    "content", [b"no json", b"{}", b'{"choices": []}', b'{"choices": [{"message": null}]}', b"[1]"]
)
def test_an_answer_that_cannot_be_read_is_a_failure(recipe, server, capsys, monkeypatch, content):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    monkeypatch.setattr(OpenAIServer, "do_POST", do_POST)
    assert train([recipe, f"answers.server={{url: {server.url}, model: big, retries: 0}}"]) == 2
    assert "got no answer that can be read" in capsys.readouterr().err


def test_a_slow_server_is_asked_again(recipe, server, capsys):
    slow = threading.Event()
    server.reply = lambda prompt: (slow.wait(5) and None) or (200, {"content": "that is 11 coins ."}, "stop")
    words = [f"answers.server={{url: {server.url}, model: big, retries: 0, timeout: 0.2}}"]
    assert train([recipe, *words]) == 2
    assert "took the server longer than" in capsys.readouterr().err
    slow.set()
    assert train([recipe, f"answers.server={{url: {server.url}, model: big, retries: 0}}"]) == 0


def test_rows_of_text_and_of_messages_end_in_one_data_set(recipe, server):
    """They used to end in an ArrowInvalid after all answers were paid for."""
    file = load_recipe(recipe).task
    turns = [{"role": "user", "content": PROMPTS[0]}]
    longer = [
        *turns,
        {"role": "assistant", "content": "tea"},
        {"role": "user", "content": [{"type": "text", "text": PROMPTS[2]}]},
    ]
    rows = [{"prompt": PROMPTS[1]}, {"messages": turns}, {"messages": longer}]
    with open(file, "w") as opened:
        opened.writelines(json.dumps(row | {"split": "answers"}) + "\n" for row in rows)
    assert train([recipe, f"answers.server={{url: {server.url}, model: big}}"]) == 0
    found, _ = answers_of(recipe)
    assert sorted(len(row["prompt"]) for row in found) == [1, 1, 3]
    assert train([recipe]) == 0  # by the engine as well


def test_a_server_that_goes_away_loses_nothing(recipe, server, capsys):
    words = ["answers.server={url: URL, model: big, retries: 0, concurrency: 1}"]
    server.reply = lambda prompt: (200 if len(server.asked) < 3 else 404, {"content": "that is 11 coins ."}, "stop")
    assert train([recipe, words[0].replace("URL", server.url)]) == 2
    assert "refuses the model 'big' or the key in $OPENAI_API_KEY" in capsys.readouterr().err
    server.reply = lambda prompt: (200, {"content": "that is 11 coins ."}, "stop")
    server.asked.clear()
    assert train([recipe, words[0].replace("URL", server.url)]) == 0
    assert len(server.asked) == 3
    assert len(answers_of(recipe)[0]) == 5


def test_a_server_that_is_not_there_is_an_error(recipe, capsys):
    assert train([recipe, "answers.server={url: 'http://127.0.0.1:9/v1', model: big, retries: 0}"]) == 2
    error = capsys.readouterr().err
    assert "http://127.0.0.1:9/v1 cannot be reached after 1 tries" in error
    assert "start the server or mend answers.server.url" in error


@pytest.mark.parametrize(("choice", "expected"), [("keep", "<think>\nfig\n</think>\n\ntea"), ("drop", "tea")])
def test_thinking_is_kept_or_dropped(recipe, smollm, choice, expected, tmp_path):
    """Whether it stands in the text or a server hands it over apart."""
    encode = Encoding(load_recipe(recipe, [f"answers.thinking={choice}"]), smollm[1])
    assert encode("a", Answered("tea", True, thinking="fig"))["answer"] == expected
    assert encode("a", Answered("<think>\nfig\n</think>\n\ntea", True))["answer"] == expected


def test_answers_of_the_engine_keep_their_tokens(recipe):
    assert train([recipe, "engine.max_new_tokens=200"]) == 0
    rows, _ = answers_of(recipe)
    assert any("coins" in row["answer"] for row in rows)
