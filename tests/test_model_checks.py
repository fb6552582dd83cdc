"""Models and what libraries take, checked before anything expensive: each refusal names the key and the remedy."""

import contextlib
import copy
import json
import shutil
import unicodedata
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tokenizers import normalizers

from eval.checks import check_models, check_prompts
from parse import Engine
from parse.local.loading import load_model
from recipes.digests import Digests
from recipes.schema import RecipeError, load_recipe
from tests.conftest import MODELS, QUICK, random_model
from tests.test_checks import EVERY, rows_of
from train.checks import check_all, check_methods


@pytest.fixture
def folders(tmp_path):
    """Words of a recipe over copies of the shipped pair."""
    for role in ("target", "draft"):
        shutil.copytree(MODELS / f"ledger-{role}", tmp_path / role)
    return [f"target={tmp_path / 'target'}", f"draft={tmp_path / 'draft'}"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("pointer", "is a git-lfs pointer, not the weights themselves: run `git lfs pull`"),
        ("cut", "is damaged or cut short"),
        ("empty", "is damaged or cut short"),
        ("none", r"lacks model.safetensors, weights that it should hold \(no \*.safetensors\): download them"),
        ("shard", "lacks model-00002-of-00002.safetensors, weights that it should hold; it holds model-00001"),
        ("no index", "lacks model.safetensors, weights that it should hold; it holds model-00001"),
        ("more layers", "lacks the weights .* that its config.json asks for"),
        ("fewer layers", "holds the weights .* beyond its config.json"),
        ("other sizes", "have other shapes than its config.json says"),
        ("index", "model.safetensors.index.json is damaged"),
        ("tokenizer", "cannot be loaded"),
        ("tokenizer cut", "cannot be loaded"),
    ],
)
@pytest.mark.parametrize("role", ["target", "draft"])
def test_models_without_whole_weights_are_refused(folders, tmp_path, role, damage, message):
    check_models(load_recipe(QUICK, folders))
    folder = tmp_path / role
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    if damage == "pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    if damage in ("cut", "empty"):
        weights.write_bytes(data[:-100] if damage == "cut" else b"")
    if damage == "none":
        weights.unlink()
    if damage == "no index":
        weights.rename(folder / "model-00001-of-00002.safetensors")
    if "layers" in damage or damage == "other sizes":
        config = json.loads((folder / "config.json").read_text())
        depth, width = ("n_layer", "n_inner") if role == "draft" else ("num_hidden_layers", "intermediate_size")
        config |= {"other sizes": {width: 40}, "more layers": {depth: config[depth] + 1}}.get(damage, {depth: 1})
        config.pop("layer_types", None)
        (folder / "config.json").write_text(json.dumps(config))
    if damage in ("shard", "index"):
        weights.rename(folder / "model-00001-of-00002.safetensors")
        parts = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        content = json.dumps({"weight_map": parts}) if damage == "shard" else "[]"
        (folder / "model.safetensors.index.json").write_text(content)
    if damage.startswith("tokenizer"):
        (folder / "tokenizer.json").write_text("{") if "cut" in damage else (folder / "tokenizer.json").unlink()
    with pytest.raises(RecipeError, match=f"{role}: (?s:.*){message}"):
        check_models(load_recipe(QUICK, folders))
    if damage not in ("tokenizer", "tokenizer cut"):
        with pytest.raises(ValueError, match=message):
            load_model(folder)


def test_a_target_may_be_a_peft_folder(tmp_path):
    """Its base is where it says, or beside it; base and LoRA both make it what it is."""
    base, folder = tmp_path / "ledger-target", tmp_path / "tuned"
    shutil.copytree(MODELS / "ledger-target", base)
    lora = get_peft_model(load_model(base), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    torch.nn.init.normal_(next(weight for name, weight in lora.named_parameters() if "lora_B" in name))
    lora.save_pretrained(folder)
    recipe = load_recipe(QUICK, [f"target={folder}", "verifier.probe.layers=[10]", f"runs={tmp_path}"])
    check_all(recipe, list(EVERY))
    digests = [Digests().of_model(recipe.target)]
    engine = Engine.from_pretrained(recipe.target, MODELS / "ledger-draft", "likelihood")
    ids = engine.encode("list : #1 fig rome 4 .")
    with torch.inference_mode():
        torch.testing.assert_close(
            engine.target(torch.tensor([ids])).logits, lora(torch.tensor([ids])).logits, atol=1e-4, rtol=1e-4
        )
    for file in (folder / "adapter_config.json", base / "generation_config.json"):
        file.write_text(file.read_text() + " ")
        digests.append(Digests().of_model(recipe.target))
    assert len({*digests}) == 3
    shutil.rmtree(base)
    with pytest.raises(RecipeError, match="target: .*tuned"):
        check_models(recipe)


@pytest.mark.parametrize("name", ["gpt2", "org/name", "bert-base.v2"])
def test_hub_ids_need_no_slash(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match=f"draft: {name} cannot be read as a model"):  # it is looked for on the hub
        check_models(load_recipe(QUICK, [f"draft={name}"]))


@pytest.mark.parametrize("name", ["./gpt2", "a/b/c", "~/model", "models/"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(name):
    with pytest.raises(RecipeError, match="is not a folder here; give the folder of a model, or a hub id"):
        check_models(load_recipe(QUICK, [f"draft={name}"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{device_mapp: auto}", "unknown option 'device_mapp' of from_pretrained; did you mean 'device_map'"),
        ("{dtype: float16}", "the option 'dtype' is set by the engine: use the argument dtype"),
        (
            "{attn_implementation: sdpa}",
            "the option 'attn_implementation' is set by the engine: use the argument attention",
        ),
        ("{num_hidden_layers: 2}", "unknown option 'num_hidden_layers'"),
        ("{device_map: 7}", "device_map=7 is no device here"),
        ("{device_map: gpu}", "device_map='gpu' is no device here: use one such as cpu, or auto"),
    ],
)
def test_options_that_from_pretrained_does_not_know_are_refused(folders, options, message):
    for role in ("target", "draft"):
        with pytest.raises(RecipeError, match=f"{role}: {message}"):
            check_models(load_recipe(QUICK, [*folders, f"engine.{role}_options={options}"]))
    check_models(
        load_recipe(QUICK, [*folders, "engine.target_options={max_position_embeddings: 400, device_map: cpu}"])
    )
    with pytest.raises(ValueError, match=message):
        load_model(MODELS / "ledger-draft", options=yaml.safe_load(options))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distill.trainer={packing: true}"], "'distill.trainer' is refused by TRL: .*packing"),
        (["distill.trainer={eval_strategy: steps}"], "'distill.trainer' is refused by TRL: .*eval"),
        (["distill.trainer={optim: adamw_quantum}"], "refused by TRL"),
        (["distill.trainer={lr_scheduler_type: zigzag}"], "refused by TRL"),
        (["distill.trainer={max_steps: x}"], "distill.trainer.max_steps is 'x': give a whole number from 1 on"),
        (["distill.trainer={max_steps: 0}"], "distill.trainer.max_steps is 0"),
        (["distill.trainer={num_train_epochs: 0}"], "num_train_epochs is 0: give a number above 0"),
        (["distill.trainer={learning_rate: -1e-4}"], "learning_rate is -0.0001"),
        (["distill.trainer={learning_rate: fast}"], "learning_rate is 'fast'"),
        (["distill.trainer={per_device_train_batch_size: 0}"], "per_device_train_batch_size is 0"),
        (["distill.trainer={gradient_accumulation_steps: 0}"], "gradient_accumulation_steps is 0"),
        (["distill.trainer={output_dir: /tmp}"], "distill.trainer.output_dir is the stage's own"),
        (["distill.method=logits", "distill.trainer={eval_strategy: steps}"], "refused by TRL"),
        (["distill.method=on_policy", "distill.trainer={eval_strategy: steps}"], "refused by TRL"),
        (["distill.method=on_policy", "distill.trainer={temperature: 0}"], "temperature is 0: give a number above 0"),
        (["align.trainer={eval_strategy: steps}"], "'align.trainer' is refused by TRL"),
        (["align.trainer={loss_type: magic}"], "'align.trainer' is refused by TRL"),
        (["align.method=on_policy", "align.trainer={eval_strategy: steps}"], "'align.trainer' is refused by TRL"),
        (["distill.lora={r: 0}"], "distill.lora.r is 0: give a number from 1 to 8192"),
        (["distill.lora={lora_dropout: 1}"], "distill.lora.lora_dropout is 1: give a number from 0 to 0.99"),
        (["distill.lora={lora_alpha: 0}"], "distill.lora.lora_alpha is 0"),
        (["distill.lora={inference_mode: true}"], "distill.lora.inference_mode is set, and the draft's LoRA is learnt"),
        (["distill.lora={modules_to_save: [nowhere]}"], "modules_to_save names nowhere"),
        (["distill.lora={task_type: SEQ_CLS}"], "task_type is 'SEQ_CLS'"),
        (["distill.trainer={report_to: wandb}"], "distill.trainer.report_to is the stage's own: set logging.wandb"),
        (["distill.lora={target_modules: [q_porj]}"], "'distill.lora' is refused by PEFT: .*q_porj"),
        (["align.lora={target_modules: [nowhere]}"], "'align.lora' is refused by PEFT"),
        (["distill.lora={target_modules: [wte]}"], "they are one weight"),
        (["distill.lora={modules_to_save: [lm_head]}"], "they are one weight"),
        (["align.lora={target_modules: [lm_head, c_attn]}"], "they are one weight"),
    ],
)
def test_what_the_libraries_refuse_is_refused_before_the_answers(words, message):
    """On one row, with small models: the trainer, its batches, its optimizer; the LoRA on the draft's architecture."""
    with pytest.raises(RecipeError, match=f"(?s){message}"):
        check_methods(load_recipe(QUICK, words), EVERY)


@pytest.mark.parametrize("method", ["sequence", "logits", "on_policy"])
def test_what_the_libraries_take_passes_and_leaves_nothing(method, tmp_path):
    words = [f"distill.method={method}", "distill.lora={r: 2, target_modules: [c_attn]}", f"runs={tmp_path / 'runs'}"]
    check_methods(load_recipe(QUICK, [*words, "align.method=on_policy"]), EVERY)
    trainer = "{lr_scheduler_type: linear, optim: sgd, dataloader_drop_last: true}"
    check_methods(load_recipe(QUICK, [*words, f"distill.trainer={trainer}"]), EVERY)
    assert not (tmp_path / "runs").exists()


def test_a_lora_on_tied_embeddings_is_not_merged(tmp_path):
    """It would change the LM head as well: logits were off by 25, and nothing was said."""
    base = load_model(MODELS / "ledger-draft", dtype=torch.float32)
    assert base.config.tie_word_embeddings
    for name, modules in (("embedding", ["wte"]), ("head", ["lm_head"]), ("layers", ["c_attn"])):
        lora = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=modules, task_type="CAUSAL_LM"))
        lora.peft_config["default"].base_model_name_or_path = str(MODELS / "ledger-draft")
        lora.save_pretrained(tmp_path / name)
        if name == "layers":
            load_model(tmp_path / name)
            continue
        with pytest.raises(ValueError, match="to merge it would change both"):
            load_model(tmp_path / name)


def test_prompts_that_a_template_refuses_are_refused(folders, tmp_path):
    (tmp_path / "target" / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{{ m.content }} {% endfor %}"
    )
    plain = rows_of(tmp_path, {"prompt": "the fig", "split": "answers"})
    check_prompts(load_recipe(QUICK, [*folders, plain]), ["answers"])
    with pytest.raises(RecipeError, match="refuses the turns system, user: .*System role not supported"):
        check_prompts(load_recipe(QUICK, [*folders, plain, "data.system=Be brief."]), ["answers"])


def test_a_template_that_leaves_out_the_users_words_is_refused(folders, tmp_path):
    """As those do that read contents given in parts alone."""
    template = (
        "{% for m in messages %}{% for c in m.content %}{% if c.text %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}."
    )
    (tmp_path / "target" / "chat_template.jinja").write_text(template)
    task = rows_of(tmp_path, {"prompt": "the fig", "split": "answers"})
    with pytest.raises(RecipeError, match="leaves out words of a prompt: of 'the fig'"):
        check_prompts(load_recipe(QUICK, [*folders, task]), ["answers"])


def test_prompts_in_another_normal_form_are_read(tmp_path, smollm):
    """Qwen's tokenizers write NFC: a prompt in NFD comes back spelled otherwise, and means the same."""
    for role in ("target", "draft"):
        random_model("llama", len(smollm[1])).save_pretrained(tmp_path / role)
        own = copy.deepcopy(smollm[1])
        own.backend_tokenizer.normalizer = normalizers.NFC()
        own.save_pretrained(tmp_path / role)
    words = unicodedata.normalize("NFD", "Où est le café de Zoë?")
    task = rows_of(tmp_path, {"prompt": words, "split": "answers"})
    folders = [f"target={tmp_path / 'target'}", f"draft={tmp_path / 'draft'}"]
    check_prompts(load_recipe(QUICK, [*folders, task]), ["answers"])


def test_duplicates_are_counted(tmp_path, capsys):
    task = rows_of(tmp_path, *[{"prompt": "the fig", "split": "answers"}] * 3)
    check_prompts(load_recipe(QUICK, [task]), ["answers"])
    assert "2 rows of" in capsys.readouterr().out


def test_a_models_own_code_is_the_users_to_allow(tmp_path, folders):
    """In a file that others may have written it is refused; whoever starts it may say so."""
    words = yaml.safe_load(Path(QUICK).read_text()) | {"engine": {"target_options": {"trust_remote_code": True}}}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(words))
    with pytest.raises(RecipeError, match="say so on the command line: engine.target_options.trust_remote_code=true"):
        load_recipe(file)
    recipe = load_recipe(QUICK, [*folders, "engine.target_options.trust_remote_code=true"])
    assert recipe.engine.target_options == {"trust_remote_code": True}
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (tmp_path / "draft" / "config.json").write_text(json.dumps(config))
    (tmp_path / "draft" / "own.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(RecipeError, match="draft: .* cannot be read as a model"):
        check_models(load_recipe(QUICK, folders))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(tmp_path / "draft")


def test_a_target_of_few_layers_is_told_of_more(folders):
    with pytest.raises(RecipeError, match="verifier.adapter.layers is 99: the target has 12"):
        check_models(load_recipe(QUICK, [*folders, "verifier.adapter.layers=99"]))


NASTY = [
    "distill.trainer={max_steps: 1e9}",
    "distill.trainer={learning_rate: null}",
    "distill.trainer={per_device_train_batch_size: [1]}",
    "distill.trainer={fsdp: nonsense}",
    "distill.trainer={gradient_checkpointing_kwargs: 3}",
    "distill.trainer={dataset_num_proc: -1}",
    "distill.lora={target_modules: 3}",
    "distill.lora={r: many}",
    "distill.lora={layers_to_transform: [99]}",
    "distill.method=gold",
    "distill.method=logits",
    "distill.top_k=1000000",
    "draft={layers: 3}",
    "draft={layers: 99}",
    "draft={config: {model_type: llama, hidden_size: 7}}",
    "draft={config: {model_type: mamba}}",
    "draft={config: {}}",
    "draft=recipes",
    "draft=.",
    "target=recipes/models",
    "target=tests",
    "task=recipes/models",
    "task=README.md",
    "task=nowhere.jsonl",
    "task=tests/test_checks.py",
    "segments=1",
    "data.system=x",
    "data.check=math",
    "engine.max_new_tokens=1",
    "engine.max_new_tokens=100000000",
    "engine.target_options={device_map: {a: cuda:9}}",
    "engine.target_options={quantization_config: nonsense}",
    "engine.draft_options={max_memory: lots}",
    "verifier.kind=prompt",
    "verifier.adapter.layers=12",
    "verifier.adapter.suffix=900",
    "verifier.probe.layers=[12, -13]",
    "rollouts.labeller=agreement",
    "align.method=on_policy",
    "align.trainer={beta: x}",
    "align.lora={modules_to_save: [nowhere]}",
    "runs=/proc/nowhere",
    "runs=README.md",
]


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(words=st.lists(st.sampled_from(NASTY), min_size=1, max_size=3))
def test_no_recipe_leaves_the_checks_with_another_exception(words):
    """Whatever passes the schema: each check refuses it as a recipe, or takes it."""
    stages = [*EVERY, "relabel"]
    with contextlib.suppress(RecipeError):
        assert check_all(load_recipe(QUICK, words), stages) > 0
