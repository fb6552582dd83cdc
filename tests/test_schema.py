"""Recipes are strict: what cannot be run is refused at once, with its name and the remedy."""

import copy
import dataclasses
import inspect
import re
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml

import recipes.schema
import recipes.verifier_schema
from eval.checks import check_models
from eval.methods import WHAT
from parse.generation import HANDBACKS, POLICIES, Settings
from parse.local.loading import load_model
from parse.segments import check_segmenter
from recipes.pair import adapted_layers, hidden_states
from recipes.schema import Recipe, RecipeError, load_recipe
from recipes.strict import DEEPEST, Range, Text
from tests.conftest import BASE, ROOT

SECTIONS = [
    cls
    for module in (recipes.schema, recipes.verifier_schema)
    for _, cls in inspect.getmembers(module, dataclasses.is_dataclass)
    if cls not in (Range, Text)
]
FIELDS = sorted({field.name for section in SECTIONS for field in dataclasses.fields(section)})


def test_every_shipped_recipe_loads():
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert isinstance(load_recipe(path), Recipe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tresholds": 1}, "unknown key 'tresholds' in the recipe"),
        ({"rollouts": {"trian": 3}}, "unknown key 'trian' in section 'rollouts'; did you mean 'train'"),
        ({"rollouts": {"train": "many"}}, r"rollouts.train must be int, and is 'many' \(str\)"),
        ({"rollouts": {"train": True}}, "rollouts.train must be int"),
        ({"rollouts": {"train": 0}}, "rollouts.train is 0: give a number from 1 to 1,000,000,000"),
        ({"segments": 1.5}, r"segments must be sentence or line or int, and is 1.5 \(float\)$"),
        ({"eval": {"methods": ["target", "pares"]}}, "eval.methods names 'pares'; did you mean 'parse'"),
        ({"eval": {"methods": ["parse"]}}, "eval.methods lacks 'target'"),
        ({"verifier": {"max_accuracy_loss": 2}}, "max_accuracy_loss is 2: give a number from 1e-06 to 0.999"),
        ({"verifier": ["probe"]}, "section 'verifier' must hold keys and values"),
        (
            {"verifier": {"probe": {"layer": [3]}}},
            "unknown key 'layer' in section 'verifier.probe'; did you mean 'layers'",
        ),
        ({"verifier": {"adapter": {"suffix": 0}}}, "verifier.adapter.suffix is 0: give a number from 1 to 1,000"),
        ({"rollouts": {"labels": "bisection"}}, "rollouts.labels names 'bisection'; did you mean 'bisect'"),
        ({"rollouts": {"labeller": "judge"}}, "rollouts.labeller names 'judge'"),
        ({"logging": {"wandb": "on"}}, "logging.wandb names 'on' Allowed: online, offline"),
        ({"stages": ["answer"]}, "stages names 'answer'; did you mean 'answers'"),
        ({"engine": {"policy": "first"}}, "engine.policy names 'first'"),
        ({"engine": {"target_options": {"tp_plan": "auto"}}}, "target_options holds tp_plan, .* use {device_map"),
        ({"pretrain": {"target": {"output": "o"}}}, "lacks the key 'speaker'"),
        (
            {"answers": {"server": {"url": "localhost:8000"}}},
            "answers.server.url is .* give an address such as http://",
        ),
        ({"answers": {"server": {"url": "http://a", "key_variable": ""}}}, "give the name of an environment variable"),
        ({"answers": {"server": "http://a"}}, "answers.server must be keys and values or null, and is 'http://a'"),
        (
            {"eval": {"concurrency": [1, 8], "prompts": 15}},
            "eval.concurrency has 8 requests at once, and eval.prompts is 15: give at least 16 prompts",
        ),
        ({"verifier": {"probe": {"layers": [-1, -1]}}}, r"probe.layers is \[-1, -1\]: name one or more, each of them"),
        ({"verifier": {"probe": {"layers": [True]}}}, r"probe.layers must be int, and is True \(bool\)$"),
        ({"engine": {"horizon": "segments"}}, "engine.horizon names 'segments'; did you mean 'segment'"),
        ({"engine": {"horizon": True}}, r"engine.horizon must be segment or int or null, and is True \(bool\)$"),
        ({"engine": {"lookahead": 1.5}}, r"engine.lookahead must be int, and is 1.5 \(float\)"),
        ({"engine": {"compile": "false"}}, r"engine.compile must be bool or null, and is 'false' \(str\)"),
        ({"data": {"fields": {"promt": "question"}}}, "data.fields names 'promt'; did you mean 'prompt'"),
        ({"data": {"fields": {"prompt": ""}}}, "data.fields.prompt is '': give text"),
        ({"data": {"system": " "}}, "data.system is ' ': give text that is not blank, or leave the key out"),
        ({"data": {"shares": {"answers": 1}}}, "section 'data.shares' lacks the key 'train'"),
        ({"data": {"shares": {"answers": 0, "train": 0, "calibration": 0, "test": 0}}}, "data.shares are all 0"),
        ({"stages": []}, r"stages is \[\]: name one or more"),
        ({"stages": ["answers", "answers"]}, "stages is .* each of them once"),
        ({"eval": {"methods": []}}, r"eval.methods is \[\]: name one or more"),
        ({"name": "../../x"}, "name is '../../x': give 1 to 100 letters, digits"),
        ({"name": ""}, "name is '': give 1 to 100 letters"),
        ({"name": "/etc/x"}, "name is '/etc/x': give"),
        ({"name": "."}, "name is '.': give"),
        ({"name": ".."}, "name is '..': give"),
        ({"name": "a\\b"}, "name is .*: give"),
        ({"name": "a\nb"}, "name is .*: give"),
        ({"name": "a" * 101}, r"name is 'a{101}': give"),
        ({"name": "数" * 61}, r"name is .*: give .*60 if not all are ASCII"),
        ({"name": 7}, r"name must be str, and is 7 \(int\); put text in quotes"),
        ({"name": True}, r"name must be str, and is True \(bool\); put text in quotes"),
        ({"name": None}, "name must be str, and is null$"),
        ({"runs": ""}, "runs is '': give a path or a name"),
        ({"target": ""}, "target is '': give a path or a name"),
        ({"draft": " "}, "draft is ' ': give a path or a name"),
        ({"task": "a\0b"}, "task is .*: give a path or a name"),
        ({"target": "a" * 300}, "target is .* no more than 255 between slashes"),
        ({"pretrain": {"../x": {}}}, "pretrain is '../x': give 1 to 100 letters"),
        ({"logging": {"project": "a/b"}}, "logging.project is 'a/b': give 1 to 128 printable characters"),
        ({"tresholds" * 10**5: 1}, r"unknown key '(tresholds)*\w*\.\.\. \(900,002 characters\) in the recipe"),
    ],
)
def test_what_cannot_be_run_is_named(write, changes, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(**changes))


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("answers.server={url: http://a, concurrency: 0}", "answers.server.concurrency", 0),
        ("answers.server={url: http://a, timeout: 0}", "answers.server.timeout", 0),
        ("answers.server={url: http://a, retries: -1}", "answers.server.retries", -1),
        ("data.shares={answers: 1, train: 1, calibration: 1, test: -1}", "data.shares.test", -1),
        ("draft={layers: 0}", "draft.layers", 0),
        ("pretrain.a={output: o, speaker: draft, architecture: {}, minutes: 0}", "pretrain.a.minutes", 0),
        *[(f"{key}=-1", key, -1) for key in ("seed", "rollouts.recheck", "engine.lookahead", "eval.warmup")],
        *[(f"{key}=-1", key, -1) for key in ("answers.batch_size", "engine.horizon", "data.max_rows", "segments")],
        *[(f"{key}=-1", key, -1) for key in ("verifier.adapter.error_weight", "verifier.adapter.layers")],
        *[(f"{key}=0", key, 0) for key in ("segments", "answers.prompts", "data.max_rows", "distill.top_k")],
        *[(f"{key}=0", key, 0) for key in ("rollouts.batch_size", "rollouts.samples", "engine.max_new_tokens")],
        *[(f"{key}=0", key, 0) for key in ("verifier.probe.batch_size", "verifier.probe.hidden", "eval.threads")],
        *[(f"{key}=0", key, 0) for key in ("verifier.probe.learning_rate", "verifier.adapter.rank", "align.prompts")],
        ("verifier.probe.learning_rate=-1e-3", "verifier.probe.learning_rate", -0.001),
        ("verifier.probe.dropout=5", "verifier.probe.dropout", 5),
        ("verifier.max_accuracy_loss=1", "verifier.max_accuracy_loss", 1),
        ("seed=1099511627776", "seed", 2**40),
        ("rollouts.train=1000000000000", "rollouts.train", 10**12),
    ],
)
def test_numbers_out_of_their_range_are_refused(write, override, key, value):
    with pytest.raises(RecipeError, match=f"^{re.escape(key)} is {value}: give a number from "):
        load_recipe(write(), [override])


def test_pickled_weights_are_refused(tmp_path, target, tokenizer):
    target.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    recipe = Recipe(**{**BASE, "target": str(tmp_path / "m"), "draft": str(tmp_path / "m")})
    check_models(recipe)
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(RecipeError, match=r"target: .* holds pickled weights \(pytorch_model.bin\).*save_pretrained"):
        check_models(recipe)
    with pytest.raises(ValueError, match="loading a pickle runs whatever code is in it"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verifier": {"probe": {"layers": [4]}}}, r"probe.layers is \[4\]: the target has hidden states 0 .* to 3"),
        ({"verifier": {"probe": {"layers": []}}}, r"probe.layers is \[\]"),
        ({"verifier": {"kind": "prompt"}}, "verifier.kind asks the target in words: .*no chat template"),
        ({"rollouts": {"labeller": "agreement"}}, "rollouts.labeller asks the target in words: .*no chat template"),
        ({"engine": {"target_options": {"revision": "v2"}}}, "target_options holds revision, .* name the folder"),
    ],
)
def test_what_the_target_cannot_give_is_refused_before_any_work(write, tmp_path, target, tokenizer, changes, message):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    for part in (target, plain):
        part.save_pretrained(tmp_path / "m")
    folders = {"target": str(tmp_path / "m"), "draft": str(tmp_path / "m")}
    check_models(load_recipe(write(**folders)))
    with pytest.raises(RecipeError, match=message):
        check_models(load_recipe(write(**folders, **changes)))
    judged = {"labeller": "agreement", "judge": {"url": "http://127.0.0.1:9/v1"}}  # who is asked instead
    check_models(load_recipe(write(**folders, rollouts=judged)))


@pytest.mark.parametrize("name", ["x", "hf_0123456789", "a" * 100, "Größe 2.5+b", "数" * 60, "2026-07-01"])
def test_names_that_are_allowed(write, name):
    assert load_recipe(write(name=name)).folder == Path("runs") / name


def test_missing_keys_and_files(tmp_path):
    path = tmp_path / "recipe.yaml"
    with pytest.raises(RecipeError, match=r"is not there; recipes found: recipes/custom_domain.yaml"):
        load_recipe(path)
    with pytest.raises(RecipeError, match=r"is a folder; recipes found: recipes/custom_domain.yaml"):
        load_recipe(tmp_path)
    for nowhere in ("a" * 5000, "a\0b", ""):
        with pytest.raises(RecipeError, match=r"recipes found"):
            load_recipe(nowhere)
    path.write_text("name: x\n")
    with pytest.raises(RecipeError, match=r"lacks the key 'target'"):
        load_recipe(path)


BASE_TEXT = yaml.safe_dump(BASE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must hold keys and values, and holds None"),
        (b"- x\n", r"must hold keys and values, and holds \['x'\]"),
        (b"name: [x\n", "recipe.yaml cannot be read: line 2, column 1: expected"),
        (b"name: x\n\ttask: y\n", r"line 2, column 1: found character '\\t'"),
        (b"name: x\n---\nname: y\n", "line 2, column 1: but found another document"),
        (b"name: x\nname: z\n", "line 2, column 1: the key name stands here twice"),
        (b"name: {a: 1, 'a': 2}\n", "line 1, column 14: the key a stands here twice"),
        (b"1: x\n", "line 1, column 1: a key must be text: put it in quotes"),
        (b"[x]: x\n", "line 1, column 1: a key must be text"),
        (b"name: \xff\n", "is not UTF-8 text from its byte 6 on"),
        ("name: x".encode("utf-16"), "is not UTF-8 text from its byte 0 on"),
        (b"name: \0\n", "special characters are not allowed"),
        (b'name: "\\UFFFFFFFF"\n', "recipe.yaml cannot be read"),
        (b'name: "\\U00110000"\n', "recipe.yaml cannot be read"),
        (b'name: "\\ud800"\n', "line 1, column 7: the text holds half of a character"),
        (b"name: " + b"[" * 5000 + b"]" * 5000, f"values are nested more than {DEEPEST} deep"),
        (b"".join(b" " * i + b"a:\n" for i in range(900)), f"values are nested more than {DEEPEST} deep"),
        (b"a: &a [x, x]\nb: &b [*a, *a]\n", "line 1, column 4: anchors, aliases and tags are not allowed"),
        (b"a: &a [*a]\n", "anchors, aliases and tags are not allowed"),
        (b"a: *a\n", "anchors, aliases and tags are not allowed"),
        (b"a: !!python/object/apply:os.system [ls]\n", "anchors, aliases and tags are not allowed"),
        (b"a: !!timestamp x\n", "anchors, aliases and tags are not allowed"),
        (b"<<: {name: x}\n", "line 1, column 1: << is read as different things"),
        (b"# " + b"x" * 10**6, "it is larger than 1,000,000 bytes"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(path)
    assert len(str(caught.value)) < 1000


def test_a_byte_order_mark_and_other_line_ends_are_read(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + BASE_TEXT.replace("\n", "\r\n").encode())
    assert load_recipe(path).name == "x"


def test_overrides(write):
    recipe = load_recipe(write(), ["rollouts.train=7", "engine.horizon=segment", "distill.trainer.max_steps=5"])
    assert recipe.rollouts.train == 7
    assert recipe.engine.horizon == "segment"
    assert recipe.distill.trainer == {"max_steps": 5}
    with pytest.raises(RecipeError, match=r"must read section.key=value"):
        load_recipe(write(), ["rollouts.train"])
    with pytest.raises(RecipeError, match="'name' is a value"):
        load_recipe(write(), ["name.x=1"])
    with pytest.raises(RecipeError, match="unknown key 'trainer'"):
        load_recipe(write(), ["rollouts.trainer=1"])
    assert load_recipe(write(), ["seed=1", "seed=2"]).seed == 2  # the later one holds
    assert load_recipe(write(), ["rollouts={train: 3}", "rollouts.test=4"]).rollouts.train == 3
    nothing = write(answers={"server": None})
    server = load_recipe(nothing, ["answers.server.url=http://a", "answers.server.timeout=2"]).answers.server
    assert server is not None
    assert (server.url, server.timeout) == ("http://a", 2.0)
    assert type(server.timeout) is float


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("=3", "override '=3' must read section.key=value"),
        ("rollouts..train=3", "must read section.key=value"),
        (".seed=3", "must read section.key=value"),
        ("rollouts.=3", "must read section.key=value"),
        ("seed", "override 'seed' must read section.key=value"),
        ("distill.trainer." + "a." * 3000 + "a=1", "must read section.key=value"),
        ("stages.0=align", r"stages must be a list, and is {'0': 'align'} \(dict\)"),
        ("task.0=align", "override 'task.0=align': 'task' is a value and has no keys"),
        ("seed=[1", r"override 'seed=\[1' cannot be read: line 1"),
        ("seed=5:50", "override 'seed=5:50' cannot be read: line 1, column 1: 5:50 is read as different things"),
        ("verifier={kind: probe, kind: best}", "the key kind stands here twice"),
        ("seed=" + "[" * 3000, "values are nested more than"),
        ("seed=", "seed must be int, and is null"),
        ("distill=", "section 'distill' must hold keys and values"),
        ("answers.batch_size=0", "answers.batch_size is 0"),
        ("logging.name=" + "x" * 10**6, "logging.name is 'x*\\.\\.\\. "),
        ("segments=" + "x" * 10**6, "segments names 'x*\\.\\.\\. "),
    ],
)
def test_overrides_that_cannot_be_read(write, override, message):
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(write(), [override])
    assert len(str(caught.value)) < 1000


def leaves(hint):
    """The types that a field's type is made of."""
    arguments = typing.get_args(hint)
    if not arguments or hint == dict[str, Any] or typing.get_origin(hint) in (Annotated, Literal):
        return [hint]
    return [leaf for argument in arguments for leaf in leaves(argument)]


def test_every_field_says_what_it_may_hold():
    """Numbers their range, texts their form or their choices; only the libraries' own arguments are free."""
    assert {"Recipe", "Pretrain", "ProbeSection", "Shares", "Server"} <= {section.__name__ for section in SECTIONS}
    for section in SECTIONS:
        for name, hint in typing.get_type_hints(section, include_extras=True).items():
            for leaf in leaves(hint):
                if typing.get_origin(leaf) is Annotated:
                    kind, limit = typing.get_args(leaf)
                    assert isinstance(limit, Text if kind is str else Range), f"{section.__name__}.{name}"
                else:
                    assert leaf not in (int, float, str, Any, dict, list), f"{section.__name__}.{name}: {hint}"


@pytest.mark.parametrize("value", ["sentence", "line", "word", "", 0, 1, -1, 40, 1.5, True, None])
def test_segments_and_horizons_are_the_engines(write, value):
    def is_allowed(check, *arguments, **options):
        try:
            check(*arguments, **options)
        except ValueError:
            return False
        return True

    assert is_allowed(load_recipe, write(segments=value)) == is_allowed(check_segmenter, value)
    if value is not True:  # the engine takes it for 1
        assert is_allowed(load_recipe, write(engine={"horizon": value})) == is_allowed(Settings, horizon=value)


def test_choices_are_those_of_the_engine_and_the_evaluation():
    def choices(section, name):
        return typing.get_args(typing.get_type_hints(section)[name])

    assert choices(recipes.schema.EngineSection, "policy") == POLICIES
    assert choices(recipes.schema.EngineSection, "handback") == HANDBACKS
    assert typing.get_args(recipes.schema.Method) == tuple(WHAT)


def test_layers_that_the_target_has():
    assert adapted_layers(None, 12) == 12
    assert adapted_layers(2, 12) == 2
    for layers in (13, 99):
        with pytest.raises(RecipeError, match=f"verifier.adapter.layers is {layers}: the target has 12; give 1 to 12"):
            adapted_layers(layers, 12)
    assert hidden_states([-1, 0], 3) == (3, 0)
    for layers in ([-1, 3], [4], []):
        with pytest.raises(RecipeError, match="name one or more, each of them once"):
            hidden_states(layers, 3)
