"""The server, over HTTP, by the official client: the engine's own answers, refusals by name, nothing left behind."""

import asyncio
import threading

import httpx
import openai
import pytest
import torch

from parse import Engine
from parse.local.model import LocalModel
from parse.remote.model import RemoteModel
from parse.text import eos_ids
from parse.verifiers import Likelihood
from tests.http_server import CHAT, PROMPT, TEXT, Running, tiny
from tests.vllm_like import VllmLike


def test_a_chat_is_what_the_engine_generates(running):
    expected = running.engine.generate(PROMPT, 30)[0]
    answer = running.client.chat.completions.create(**CHAT)
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == (expected.text, expected.finish_reason)
    prompt = len(running.engine.encode(PROMPT))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, len(expected.token_ids))
    assert [one["text"] for one in choice.parse["segments"]] == [one.text for one in expected.segments]
    assert choice.parse["accepted_tokens"] == expected.stats.accepted_tokens
    assert answer.metrics["speculative_decoding"]["num_draft_tokens"] == expected.stats.draft_tokens


def test_a_conversation_goes_on_with_the_clients_own_message(running):
    """The official client sends back all that it was given."""
    first = running.client.chat.completions.create(**CHAT).choices[0].message
    more = [first, {"role": "user", "content": "the fig"}]
    second = running.client.chat.completions.create(**CHAT | {"messages": CHAT["messages"] + more})
    dumped = [first.model_dump(), more[1]]
    same = running.client.chat.completions.create(**CHAT | {"messages": CHAT["messages"] + dumped})
    assert second.choices[0].message.content == same.choices[0].message.content


def test_a_last_message_of_the_assistant_is_continued(running):
    """Whether the client says so, as vLLM's do, or not; who says that it is to be answered is refused."""
    begun = [*CHAT["messages"], {"role": "assistant", "content": "the fig costs"}]
    expected = running.engine.generate([begun], 30)[0].text
    assert running.engine.encode(begun)[-3:] == running.engine.tokenizer.encode(
        "the fig costs", add_special_tokens=False
    )
    said = {"continue_final_message": True, "add_generation_prompt": False}
    for more in ({}, said):
        choice = running.client.chat.completions.create(**CHAT | {"messages": begun}, extra_body=more).choices[0]
        assert choice.message.content == expected
    for name, value in said.items():
        for messages, wrong in ((begun, not value), (CHAT["messages"], value)):
            reply = running.post("/v1/chat/completions", CHAT | {"messages": messages, name: wrong})
            assert reply.status_code == 400
            assert f"{name} must be" in reply.json()["error"]["message"]


def test_parts_of_text_and_both_names_of_the_limit(running):
    whole = running.client.chat.completions.create(**CHAT).choices[0].message.content
    parts = [{"type": "text", "text": PROMPT[:9]}, {"type": "text", "text": PROMPT[9:]}]
    body = {"model": "tiny", "messages": [{"role": "user", "content": parts}], "max_completion_tokens": 30}
    assert running.client.chat.completions.create(**body).choices[0].message.content == whole


@pytest.mark.parametrize("switches", [{}, {"method": "target"}, {"threshold": 1.1}, {"horizon": 5, "lookahead": 2}])
def test_streams_join_to_the_whole_answer_and_say_where_its_pieces_are_from(running, switches):
    expected = running.engine.generate(PROMPT, 30, **switches)[0]
    chunks = running.events("/v1/chat/completions", CHAT | {"parse": switches})
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(len(chunk["choices"]) == 1 and "usage" not in chunk for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == expected.text
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + [expected.finish_reason]
    told = choices[-1]["parse"]["segments"]
    assert [one["text"] for one in told] == [one.text for one in expected.segments]
    early = [one["text"] for choice in choices[:-1] for one in choice.get("parse", {}).get("segments", [])]
    assert early == [one["text"] for one in told][: len(early)]
    assert early or switches == {"method": "target"}
    roles = [choice["delta"]["role"] for choice in choices if "role" in choice["delta"]]
    assert roles == ["assistant"]


def test_usage_of_a_stream_comes_when_it_is_asked_for(running):
    body = TEXT | {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    *chunks, last = running.events("/v1/completions", body)
    assert last["choices"] == []
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert last["usage"]["completion_tokens"] == counts[-1] == 30
    stream = running.client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True})
    assert [chunk.usage.total_tokens for chunk in stream if not chunk.choices]


def test_prompts_in_every_form(running):
    """Text, texts, tokens and batches of tokens; what the engine says to the raw text."""
    engine, other = running.engine, "list : #1 jam paris 2 ."
    expected = [engine.generate(text, 30, raw=True)[0].text for text in (PROMPT, other)]
    ids = [engine.tokenizer.encode(text) for text in (PROMPT, other)]
    for prompt, count in ((PROMPT, 1), (ids[0], 1), ([PROMPT, other], 2), (ids, 2)):
        answer = running.client.completions.create(**TEXT | {"prompt": prompt})
        assert [choice.text for choice in answer.choices] == expected[:count]
        assert [choice.index for choice in answer.choices] == [*range(count)]


def test_choices_draw_from_streams_of_their_own(running):
    ways = {"temperature": 1.0, "seed": 3, "top_k": 20, "top_p": 0.9}
    answer = running.client.completions.create(**TEXT, n=3, temperature=1, seed=3, top_p=0.9, extra_body={"top_k": 20})
    alone = [running.engine.generate(PROMPT, 30, raw=True, **ways | {"seed": 3 + i})[0].text for i in range(3)]
    assert [choice.text for choice in answer.choices] == alone
    assert len(set(alone)) == 3
    streams = {}
    for chunk in running.events("/v1/completions", TEXT | ways | {"n": 3}):
        for choice in chunk["choices"]:
            streams[choice["index"]] = streams.get(choice["index"], "") + choice["text"]
    assert [streams[i] for i in range(3)] == alone


def test_choices_differ_with_the_servers_own_seed_too(running):
    running.serving.defaults |= {"seed": 3, "temperature": 1.0}
    answer = running.client.completions.create(**TEXT, n=2)
    alone = [running.engine.generate(PROMPT, 30, raw=True, temperature=1.0, seed=3 + i)[0].text for i in range(2)]
    assert [choice.text for choice in answer.choices] == alone


def test_a_stop_string_ends_a_stream_before_it_shows(running):
    whole = running.engine.generate(PROMPT, 30, raw=True)[0].text
    stop = whole[len(whole) // 2 :][:5]
    chunks = running.events("/v1/completions", TEXT | {"stop": [stop]})
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == whole[: whole.find(stop)]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_how_likely_a_text_is(running):
    """The target's own numbers, in the form in which harnesses read them."""
    engine = running.engine
    ids = engine.tokenizer.encode(PROMPT)
    with torch.no_grad():
        after = engine.target(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    wanted = after.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    answer = running.client.completions.create(model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=1)
    found = answer.choices[0].logprobs
    assert answer.choices[0].text == PROMPT
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[1:] == pytest.approx(wanted, abs=1e-4)
    assert [max(one.values()) for one in found.top_logprobs[1:]] == pytest.approx(
        after.max(-1).values.tolist(), abs=1e-4
    )
    assert len(found.tokens) == len(found.text_offset) == len(ids)
    more = running.client.completions.create(model="tiny", prompt=ids, max_tokens=1, echo=True, logprobs=1)
    assert more.choices[0].logprobs.token_logprobs[1:-1] == pytest.approx(wanted, abs=1e-4)
    written = running.client.completions.create(model="tiny", prompt=ids, max_tokens=3, logprobs=0).choices[0]
    assert len(written.logprobs.token_logprobs) == 3


def test_an_answers_own_end_counts_among_rated_tokens_and_a_stop_string_does_not(running, monkeypatch):
    engine, target = running.engine, running.engine.models["target"]
    ids = engine.tokenizer.encode(PROMPT)
    written = engine.generate(PROMPT, 9, raw=True, method="target")[0].token_ids
    body = TEXT | {"prompt": ids, "max_tokens": 9, "logprobs": 1, "parse": {"method": "target"}}
    word = engine.tokenizer.decode(written[4])
    stopped = running.post("/v1/completions", body | {"stop": [word]}).json()
    assert len(stopped["choices"][0]["logprobs"]["tokens"]) == stopped["usage"]["completion_tokens"]
    monkeypatch.setattr(target.runner, "eos_ids", frozenset([written[5]]))
    ended = running.post("/v1/completions", body).json()
    count = ended["usage"]["completion_tokens"]
    assert len(ended["choices"][0]["logprobs"]["tokens"]) == count + 1
    assert ended["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("path", "change", "status", "param"),
    [
        ("chat/completions", {"messages": []}, 400, "messages"),
        ("chat/completions", {"messages": [{"role": "user"}]}, 400, "messages.0.content"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, None),
        ("chat/completions", {"model": "other"}, 404, "model"),
        ("chat/completions", {"max_tokens": 0}, 400, "max_tokens"),
        ("chat/completions", {"max_tokens": "many"}, 400, "max_tokens"),
        ("chat/completions", {"temperature": -1}, 400, "temperature"),
        ("chat/completions", {"top_p": 2}, 400, "top_p"),
        ("chat/completions", {"stop": [""]}, 400, "stop"),
        ("chat/completions", {"logprobs": True}, 400, "logprobs"),
        ("chat/completions", {"tools": [{"type": "function"}]}, 400, "tools"),
        ("chat/completions", {"frequency_penalty": 0.5}, 400, "frequency_penalty"),
        ("chat/completions", {"ingenuity": 3}, 400, "ingenuity"),
        ("chat/completions", {"parse": {"treshold": 0.5}}, 400, "parse.treshold"),
        ("chat/completions", {"parse": {"method": "magic"}}, 400, "parse.method"),
        ("chat/completions", {"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ("chat/completions", {"n": 17}, 422, "n"),
        ("completions", {"prompt": ""}, 400, "prompt"),
        ("completions", {"prompt": []}, 400, "prompt"),
        ("completions", {"prompt": [10**6]}, 400, "prompt"),
        ("completions", {"prompt": ["a", ""]}, 400, "prompt"),
        ("completions", {"prompt": "fig " * 600}, 400, "prompt"),
        ("completions", {"echo": True, "stream": True}, 400, "stream"),
        ("completions", {"max_tokens": 0}, 400, "max_tokens"),
        ("completions", {"suffix": "the end"}, 400, "suffix"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(running, path, change, status, param):
    body = (CHAT if path.startswith("chat") else TEXT) | change
    reply = running.post(f"/v1/{path}", body)
    error = reply.json()["error"]
    assert (reply.status_code, error["type"]) == (status, "invalid_request_error")
    assert error["message"]
    if param:
        assert error["param"] == param


def test_what_asks_for_nothing_is_let_through(running):
    more = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": None, "tools": None, "user": "me", "n": 1}
    more |= {"stream": None, "parse": None, "metadata": None, "audio": None, "tool_choice": "auto", "tools": []}
    assert running.post("/v1/chat/completions", CHAT | more | {"response_format": {"type": "text"}}).status_code == 200
    switches = {"method": None, "threshold": None, "horizon": None, "lookahead": None}
    assert running.post("/v1/chat/completions", CHAT | {"parse": switches}).status_code == 200


def test_bodies_that_are_none(running):
    for body in (b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b'{"model": 3}', b"[" * 10000):
        reply = running.post("/v1/chat/completions", body)
        assert reply.status_code == 400
        assert reply.json()["error"]["message"]
    assert running.post("/v1/chat/completions", CHAT, headers={"content-type": "text/plain"}).status_code == 415
    assert running.post("/v1/nowhere", b"{}").status_code == 404
    assert httpx.get(f"{running.url}/v1/completions").status_code == 405
    with pytest.raises(openai.NotFoundError, match="is not served here: use 'tiny'"):
        running.client.chat.completions.create(**CHAT | {"model": "gpt-4"})


def test_models_tokens_and_the_request_id(running):
    model = running.client.models.list().data[0]
    assert (model.id, model.max_model_len) == ("tiny", 512)
    ids = running.post("/tokenize", {"prompt": PROMPT}).json()
    assert ids["tokens"] == running.engine.tokenizer.encode(PROMPT)
    assert running.post("/detokenize", {"tokens": ids["tokens"]}).json() == {"prompt": PROMPT}
    chat = running.post("/tokenize", {"messages": CHAT["messages"]}).json()
    assert chat["tokens"] == running.engine.encode(PROMPT)
    assert running.post("/tokenize", {}).status_code == 400
    reply = running.post("/v1/chat/completions", CHAT, headers={"x-request-id": "mine"})
    assert reply.headers["x-request-id"] == "mine"
    assert running.post("/v1/chat/completions", CHAT).headers["x-request-id"]
    for path in ("/health", "/metrics", "/v1/models", "/", "/v1/nowhere"):
        assert httpx.get(running.url + path, headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"


def test_an_error_of_our_own_has_an_identity_too(running, monkeypatch):
    monkeypatch.setattr("parse.server.app.text_of", lambda *_: 1 / 0)
    reply = running.post("/detokenize", {"tokens": [5]}, headers={"x-request-id": "mine"})
    assert (reply.status_code, reply.headers["x-request-id"]) == (500, "mine")
    assert reply.json()["error"]["message"] == "the request failed: ZeroDivisionError"


def test_an_end_that_is_ignored(running, monkeypatch):
    """By either model, whole or in a stream; and `false` asks for nothing."""
    engine, runners = running.engine, [model.runner for model in running.engine.models.values()]
    written = engine.generate(PROMPT, 9, raw=True, method="target")[0].token_ids
    for runner in runners:
        monkeypatch.setattr(runner, "eos_ids", frozenset([written[4]]))
    for method in ("target", "parse"):
        body = TEXT | {"max_tokens": 20, "parse": {"method": method}}
        count = lambda **more: running.post("/v1/completions", body | more).json()["usage"]["completion_tokens"]  # noqa: B023
        assert count(ignore_eos=True) == 20
        assert count(ignore_eos=False) == count() < 20
    chunks = running.events("/v1/completions", TEXT | {"max_tokens": 20, "ignore_eos": True})
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_the_async_client_at_once(running):
    """Many requests of one process, some of them streamed: each what the engine says alone."""
    prompts = [f"list : #{i} fig rome {i} ." for i in range(1, 7)]
    expected = [result.text for result in running.engine.generate(prompts, 25)]

    async def ask(client, index):
        body = CHAT | {"messages": [{"role": "user", "content": prompts[index]}], "max_tokens": 25}
        if index % 2:
            return (await client.chat.completions.create(**body)).choices[0].message.content
        stream = await client.chat.completions.create(**body, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, index) for index in range(len(prompts))))

    assert asyncio.run(ask_all()) == expected


def test_many_clients_get_the_answers_that_they_get_alone(running):
    prompts = [f"list : #{i} fig rome {i} ." for i in range(1, 7)] * 2
    expected = [result.text for result in running.engine.generate(prompts, 25)]
    found = [""] * len(prompts)

    def ask(index):
        body = CHAT | {"messages": [{"role": "user", "content": prompts[index]}], "max_tokens": 25}
        if index % 3 == 0:
            found[index] = running.client.chat.completions.create(**body).choices[0].message.content
        else:
            for chunk in running.client.chat.completions.create(**body, stream=True):
                found[index] += chunk.choices[0].delta.content or ""

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == expected


def test_a_target_on_a_server_is_served_too(target, draft, tokenizer, tmp_path):
    """As the engine answers; what takes its weights is refused before anything is written."""
    target.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    away = VllmLike(LocalModel.of(target, tokenizer, eos_ids(target, tokenizer.eos_token_id)), str(tmp_path))
    engine = Engine(RemoteModel.connect(away.url), tokenizer, draft, tokenizer, Likelihood("mean", "segment", 0.05), 4)
    one = Running(engine)
    try:
        expected = engine.generate(PROMPT, 30)[0]
        answer = one.client.chat.completions.create(**CHAT)
        assert answer.choices[0].message.content == expected.text
        assert {piece["source"] for piece in answer.choices[0].parse["segments"]} == {"draft", "target"}
        chunks = one.events("/v1/chat/completions", CHAT)
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected.text
        seen = len(away.seen)
        refused = one.post("/v1/completions", TEXT | {"logprobs": 1})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "logprobs")
        assert len(away.seen) == seen
    finally:
        one.close()
        away.close()


def test_switches_are_heeded_where_little_or_nothing_is_written(running):
    """A single token is the target's unless the request says otherwise; a text that is only rated takes no switches."""
    one = TEXT | {"max_tokens": 1}
    ask = lambda body: running.post("/v1/completions", body).json()["choices"][0]["parse"]["draft_tokens"]
    assert (ask(one), ask(one | {"parse": {"method": "parse"}})) == (0, 1)
    rated = TEXT | {"max_tokens": 0, "echo": True, "logprobs": 1}
    assert running.post("/v1/completions", rated).status_code == 200
    refused = running.post("/v1/completions", rated | {"parse": {"threshold": 0.5}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "parse")


def test_a_server_whose_worker_has_ended_says_so(target, draft, tokenizer):
    one = Running(tiny(target, draft, tokenizer))
    one.serving.worker.close()
    assert one.post("/v1/chat/completions", CHAT).status_code == 503
    one.close()
