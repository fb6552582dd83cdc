"""Who says whether answers are right where no program does: the target, or a model on a server."""

import math

import pytest

from eval.judges import Agreement, AskedServer, AskedTarget, asked_by
from eval.server import Client
from eval.tasks.rows import key_of
from parse import Engine
from parse.scheduler import run, run_together
from recipes.schema import RecipeError, Server, load_recipe
from tests.conftest import QUICK

PROMPT = "Name a fruit."


def judge(engine, server, **options):
    client = Client(Server(server.url, retries=0, **options), "big", 1, "rollouts.judge")
    return Agreement(engine, 0, AskedServer(client), references={PROMPT: "A fig."})


@pytest.fixture
def engine(target, tokenizer):
    return Engine(target, tokenizer, compile=False)


def verdict(**probabilities):
    """A reply with the probabilities of some words."""
    words = [{"token": f" {word}", "logprob": math.log(p), "bytes": None} for word, p in probabilities.items()]
    first = {**words[0], "top_logprobs": words}
    return 200, {"content": words[0]["token"], "logprobs": {"content": [first], "refusal": None}}, "length"


def test_a_server_weighs_yes_against_no_in_both_orders(engine, server):
    server.reply = lambda question: (
        verdict(Yes=0.6, yes=0.1, No=0.1, Well=0.2) if question.find("plum") > question.find("fig") else verdict(no=0.5)
    )
    agreement = judge(engine, server)
    probability = run(agreement.probability_same(PROMPT, "A fig.", "A plum."))
    assert probability == pytest.approx((0.7 / 0.8 + 0) / 2)
    assert [one["model"] for one in server.asked] == ["big", "big"]
    assert all(PROMPT in one["messages"][0]["content"] and one["max_tokens"] == 1 for one in server.asked)
    agreement.threshold = 0.43
    assert run(agreement.is_right(PROMPT, "A plum."))
    agreement.threshold = 0.44
    assert not run(agreement.is_right(PROMPT, "A plum."))


def test_of_a_server_without_probabilities_the_word_counts_and_the_same_words_are_not_asked_about(engine, server):
    server.reply = lambda question: (200, {"content": "Yes" if "quince" in question else "No"}, "length")
    answers = ["A quince.", "A stone.", "A  fig.", ""]
    agreement = judge(engine, server, concurrency=2)
    found = dict(run_together((agreement.is_right(PROMPT, answer) for answer in answers), 4))
    assert [found[i] for i in range(4)] == [True, False, True, False]
    assert len(server.asked) == 4


def test_a_judge_sees_begun_answers_whole(engine, server):
    server.reply = lambda question: verdict(yes=0.9, no=0.1)
    begun, agreement = (
        [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "A "}],
        judge(engine, server),
    )
    agreement.references[key_of(begun)] = "fig."
    assert run(agreement.is_right(begun, "plum."))
    first, second = (one["messages"][0]["content"] for one in server.asked)
    assert f"Question:\n{PROMPT}\n\nFirst answer:\nA fig.\n\nSecond answer:\nA plum.\n\n" in first
    assert f"Question:\n{PROMPT}\n\nFirst answer:\nA plum.\n\nSecond answer:\nA fig.\n\n" in second
    assert run(agreement.is_right(begun, ""))  # the beginning may be all of it
    assert len(server.asked) == 4


@pytest.mark.parametrize(
    ("status", "message", "last"), [(200, {"content": "Maybe"}, "Maybe"), (500, {}, "no"), (400, {}, "no")]
)
def test_what_a_judge_leaves_open_is_no_yes_and_much_of_it_is_an_error(engine, server, status, message, last):
    server.reply = lambda question: (status, message, "length")
    agreement = judge(engine, server)
    for _ in range(5):  # both orders each
        assert not run(agreement.is_right(PROMPT, "A plum."))
    with pytest.raises(RecipeError, match=f"rollouts.judge: .*11 of 11 questions with neither.*{last}"):
        run(agreement.is_right(PROMPT, "A plum."))


def test_a_judge_without_probabilities_is_asked_without_them(engine, server):
    knows = lambda: "logprobs" in server.asked[-1]
    server.reply = lambda question: (400, {}, "length") if knows() else (200, {"content": "Yes"}, "length")
    assert run(judge(engine, server).is_right(PROMPT, "A plum."))
    assert ["logprobs" in one for one in server.asked] == [True, False, False]


def test_a_judge_that_refuses_the_model_is_an_error(engine, server):
    server.reply = lambda question: (404, {}, "length")
    with pytest.raises(RecipeError, match="rollouts.judge: .*refuses the model 'big'"):
        run(judge(engine, server).is_right(PROMPT, "A plum."))


def test_a_recipe_names_the_judge(engine, server):
    assert isinstance(asked_by(load_recipe(QUICK), engine), AskedTarget)
    recipe = load_recipe(QUICK, [f"rollouts.judge={{url: {server.url}, model: big}}"])
    server.reply = lambda question: (200, {"content": "yes"}, "length")
    assert run(asked_by(recipe, engine).probability_yes("Is it?")) == 1.0
