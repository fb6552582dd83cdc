"""Models on a server: the same answers as here, through whatever the network does; and what is refused at start."""

import copy
import threading
import time
from dataclasses import replace

import pytest

from eval.methods import methods_of
from parse import Engine
from parse.local.model import LocalModel
from parse.remote.client import ServerError
from parse.remote.model import RemoteModel, cached_share
from parse.scheduler import run
from parse.text import eos_ids
from parse.verifiers import Likelihood, PromptVerifier
from recipes.pair import load_engine
from recipes.schema import RecipeError, load_recipe
from tests.conftest import LISTS, QUICK
from tests.vllm_like import VllmLike

FAST = {"patience": 3.0}


@pytest.fixture
def folder(target, tokenizer, tmp_path):
    """The target's folder."""
    target.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    return tmp_path / "target"


@pytest.fixture
def server(target, tokenizer, folder):
    made = VllmLike(LocalModel.of(target, tokenizer, eos_ids(target, tokenizer.eos_token_id)), str(folder))
    yield made
    made.close()


def engines(server, target, draft, tokenizer, verifier=None, **options):
    """The same engine with its target on a server and here."""
    verifier = verifier or Likelihood("mean", "segment", 0.05)
    away = Engine(
        RemoteModel.connect(f"{server.url}#tiny", {**FAST, **options}), tokenizer, draft, tokenizer, verifier, 4
    )
    return away, Engine(target, tokenizer, draft, tokenizer, verifier, 4, compile=False)


@pytest.mark.parametrize("verifier", ["likelihood", "prompt"])
@pytest.mark.parametrize("handback", ["segment", "never"])
def test_a_target_on_a_server_answers_as_the_same_one_here(server, target, draft, tokenizer, verifier, handback):
    asked = PromptVerifier(encode(tokenizer, "right ?"), [5, 6], [7], 0.5) if verifier == "prompt" else None
    away, here = engines(server, target, draft, tokenizer, asked)
    settings = {"max_new_tokens": 24, "handback": handback}
    if verifier == "likelihood":
        settings["threshold"] = 2e-4
    ours, theirs = here.generate(LISTS, **settings), away.generate(LISTS, **settings)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
        for a, b in zip(one.segments, other.segments, strict=True):
            assert (a.text, a.source, a.accepted) == (b.text, b.source, b.accepted)
            assert a.confidence == pytest.approx(b.confidence, abs=1e-4)
    assert any(one.stats.accepted_tokens for one in ours)
    assert any(one.stats.target_tokens for one in ours)


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def test_an_end_that_is_ignored_by_a_server(server, target, draft, tokenizer):
    away, here = engines(server, target, draft, tokenizer)
    expected = [one.token_ids for one in here.generate(LISTS, 16, method="target")]
    model = replace(away.models["target"], eos_ids=frozenset(expected[0][5:6]))
    away.models["target"] = away.pair.target = model
    assert len(away.generate(LISTS, 16, method="target")[0].token_ids) < 6
    found = away.generate(LISTS, 16, method="target", ignore_eos=True)
    assert [one.token_ids for one in found] == expected


def test_both_models_may_be_on_a_server(server, target, tokenizer):
    model = RemoteModel.connect(f"{server.url}#tiny", FAST)
    away = Engine(model, tokenizer, model, tokenizer, Likelihood(), 4)
    assert [one.token_ids for one in away.generate(LISTS, 12, threshold=0.0)] == [
        one.token_ids for one in Engine(target, tokenizer).generate(LISTS, 12, method="target")
    ]


@pytest.mark.parametrize(
    "failures", [["503"], ["429", "500"], ["cut"], ["drop", "cut", "502", "cut"], ["abort", "abort"]]
)
def test_what_fails_on_the_way_is_asked_again(server, target, draft, tokenizer, failures):
    away, here = engines(server, target, draft, tokenizer)
    ours = [one.token_ids for one in here.generate(LISTS, 16, method="target")]
    server.failures = list(failures)
    assert [one.token_ids for one in away.generate(LISTS, 16, method="target")] == ours
    assert server.failures == []


def test_a_server_may_be_killed_and_come_back(server, target, draft, tokenizer, folder):
    away, here = engines(server, target, draft, tokenizer, patience=30.0)
    settings = {"max_new_tokens": 40, "threshold": 2e-4}
    expected = [one.token_ids for one in here.generate(LISTS, **settings)]
    found = []
    asking = threading.Thread(target=lambda: found.extend(away.generate(LISTS, **settings)))
    asking.start()
    while len(server.seen) < 12 and asking.is_alive():
        time.sleep(0.01)
    server.close()
    assert asking.is_alive()
    time.sleep(0.5)
    again = VllmLike(server.model, str(folder), server.port)
    asking.join(60)
    again.close()
    assert [one.token_ids for one in found] == expected


def test_a_server_that_stays_away_is_named(server, target, draft, tokenizer):
    away, _ = engines(server, target, draft, tokenizer, patience=0.5)
    server.close()
    with pytest.raises(ServerError, match=r"has failed for 0.5 s .*start the server"):
        away.generate(LISTS[0], 8, method="target")


def test_whoever_stops_listening_frees_the_server(server, target, draft, tokenizer):
    away, _ = engines(server, target, draft, tokenizer)
    server.delay = 0.1  # so that nothing ends by itself meanwhile
    stream = away.stream("tea", max_new_tokens=200, method="target")
    next(stream)
    assert server.going == 1
    stream.close()
    limit = time.monotonic() + 2
    while server.going and time.monotonic() < limit:
        time.sleep(0.01)
    assert server.going == 0


def test_an_answer_does_not_depend_on_how_many_are_asked(server, target, draft, tokenizer):
    away, _ = engines(server, target, draft, tokenizer)
    settings = {"max_new_tokens": 16, "threshold": 2e-4, "temperature": 0.8, "seed": 3}
    together = away.generate(LISTS, **settings)
    alone = [away.generate(prompt, **settings)[0] for prompt in LISTS]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]


@pytest.mark.parametrize("verifier", ["likelihood", "prompt"])
def test_answers_may_fill_the_servers_context(server, target, draft, tokenizer, verifier):
    """The server judges one token less than it holds: the engine stops before it."""
    server.context = 24
    asked = PromptVerifier(encode(tokenizer, "right ?"), [5, 6], [7], 0.5) if verifier == "prompt" else None
    away, _ = engines(server, target, draft, tokenizer, asked)
    found = away.generate(["the fig", "tea"], 200, threshold=0.0)
    assert all(one.finish_reason in ("stop", "length") for one in found)
    assert all(one.stats.verify_passes for one in found)


def test_a_request_that_hangs_is_asked_again_though_patience_is_shorter(server, target, draft, tokenizer):
    away, here = engines(server, target, draft, tokenizer, timeout=0.5, patience=0.4)
    server.failures = ["hang"]
    expected = here.generate("tea", 6, method="target")[0].token_ids
    assert len(expected) > 2
    assert away.generate("tea", 6, method="target")[0].token_ids == expected


def test_a_text_that_is_taken_up_again_is_drawn_by_other_numbers(server, target, draft, tokenizer):
    away, _ = engines(server, target, draft, tokenizer)
    server.failures = ["cut"]
    away.generate("tea", 8, method="target", temperature=1.0, seed=1)
    seeds = [body["seed"] for path, body in server.seen if path == "/v1/completions"]
    assert len(seeds) == len({*seeds}) == 2


def test_nothing_that_is_not_asked_for_comes_from_the_models_generation_config(server, target, draft, tokenizer):
    away, _ = engines(server, target, draft, tokenizer)
    away.generate("tea", 2, method="target")
    body = server.seen[-1][1]
    assert (body["repetition_penalty"], body["top_k"], body["top_p"], body["min_p"]) == (1.0, 0, 1.0, 0.0)


def test_an_address_may_lack_its_version_and_must_be_one(server):
    assert RemoteModel.connect(server.url.removesuffix("/v1"), FAST).client.url == server.url
    with pytest.raises(ValueError, match="is no address"):
        RemoteModel.connect("http://host:80a0/v1", FAST)


def test_labels_in_the_vocabulary_are_never_written(server, target, tokenizer):
    plain = RemoteModel.connect(server.url, FAST)  # one model is served: it needs no name
    ids = tokenizer.encode("tea")
    first = run(plain.open(ids).decode([], 1)).ids
    assert run(replace(plain, forbidden=frozenset(first)).open(ids).decode([], 1)).ids != first


def test_texts_that_the_server_would_cut_are_refused(server):
    model = RemoteModel.connect(server.url, FAST)
    with pytest.raises(
        ValueError, match="a text of 256 tokens .* reads 255: start the server with a larger --max-model-len"
    ):
        run(model.label_scores([1] * 200, [[1] * 56], ((5,), (6,))))
    assert len(run(model.label_scores([1] * 200, [[1] * 55], ((5,), (6,))))) == 1


def test_what_a_server_cannot_give_is_refused_at_start(server, target, draft, tokenizer, tmp_path):
    url = f"{server.url}#tiny"
    with pytest.raises(ValueError, match="serves tiny, not 'other'"):
        RemoteModel.connect(f"{server.url}#other", FAST)
    with pytest.raises(ValueError, match=r"unknown options \['retries'\]"):
        RemoteModel.connect(url, {"retries": 3})
    with pytest.raises(ValueError, match="lookahead=2 takes both models on this machine"):
        engines(server, target, draft, tokenizer)[0].generate("tea", 4, threshold=0.1, lookahead=2)
    from parse.verifiers import Probe
    from parse.verifiers.heads import HazardHead

    with pytest.raises(ValueError, match="'probe' needs states.*such as `folded`"):
        engines(server, target, draft, tokenizer, Probe(HazardHead(8, 4), (1,)))
    server.cache = False
    with pytest.raises(ValueError, match="start it with --enable-prefix-caching"):
        RemoteModel.connect(url, FAST)
    server.cache = True
    server.routes -= {"/generative_scoring"}
    asked = PromptVerifier(encode(tokenizer, "right ?"), [5], [7], 0.5)
    with pytest.raises(ValueError, match="'prompt' needs label_scores, and this target gives token_logprobs"):
        engines(server, target, draft, tokenizer, asked)
    server.routes |= {"/generative_scoring"}
    server.root = str(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="name a folder or a hub id that has it"):
        RemoteModel.connect(url, FAST)


def test_another_tokenizer_is_refused(server, tokenizer):

    other = copy.deepcopy(tokenizer)
    other.add_tokens(["Größe"])
    with pytest.raises(ValueError, match="has another tokenizer than"):
        RemoteModel.connect(server.url, FAST, other)


def test_the_share_of_the_prefix_cache_is_that_of_the_time_between():
    text = 'vllm:prefix_cache_queries_total{{engine="0"}} {0}\nvllm:prefix_cache_hits_total{{engine="0"}} {1}\n'
    assert cached_share(text.format(100, 10), text.format(300, 160)) == pytest.approx(0.75)
    assert cached_share("", "") is None


def test_an_evaluation_asks_a_server_for_what_it_can_do(server, target, draft, tokenizer):
    away, here = engines(server, target, draft, tokenizer)
    recipe = load_recipe(QUICK)
    able = ["target", "draft", "cascade", "sequential", "parse"]
    assert methods_of(recipe, away, LISTS) == able
    assert {*able, "speculation", "generate"} <= {*methods_of(recipe, here, LISTS)}
    asked = load_recipe(QUICK, ["eval.methods=[target,generate,parse]"])
    with pytest.raises(RecipeError, match=r"eval.methods has generate, .* is on a server"):
        methods_of(asked, away, LISTS)
    with pytest.raises(RecipeError, match="engine.lookahead is 4"):
        load_recipe(QUICK, ["engine.target_url=http://localhost:8000/v1#m", "engine.lookahead=4"])


def test_the_recipes_target_is_asked_where_it_is_served(server, target, tokenizer, folder):
    """Its tokenizer and configuration are the recipe's, as the server's folder is on another machine."""
    server.root = "/elsewhere/target"
    recipe = load_recipe(QUICK, [f"target={folder}", f"engine.target_url={server.url}#tiny"])
    engine = load_engine(recipe)
    assert engine.served == [f"{server.url}#tiny"]
    assert load_engine(recipe, served=False).served == []
    expected = Engine(target, tokenizer).generate(LISTS, 12, method="target")
    assert [one.text for one in engine.generate(LISTS, 12, method="target")] == [one.text for one in expected]
    with pytest.raises(RecipeError, match="holds 256 tokens, and answers may have 300 .*larger --max-model-len"):
        load_engine(
            load_recipe(QUICK, [f"target={folder}", f"engine.target_url={server.url}", "engine.max_new_tokens=300"])
        )
    with pytest.raises(ValueError, match="this needs the target's weights on this machine"):
        engine.target  # noqa: B018


def test_labels_of_a_server_whose_folder_is_elsewhere_are_known(server, target, tokenizer, folder):
    """By its taking two tokens more than the target that was folded has."""
    rows = len(tokenizer)
    options = {**FAST, "tokenizer": str(folder)}
    server.root = "/elsewhere/folded"
    assert RemoteModel.connect(server.url, options).forbidden == set()
    wider = copy.deepcopy(target)
    wider.resize_token_embeddings(rows + 2)
    server.model = LocalModel.of(wider, tokenizer)
    assert RemoteModel.connect(server.url, options).forbidden == {rows, rows + 1}
