"""python -m parse fold RUN OUT: the run's target with its folded verifier's rows in its LM head, to be served.

Only the files that hold the head, and the embedding where both are one weight, are written anew; all others are links
to the target's own. A server needs nothing else: see `parse.verifiers.folded`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from parse.local.loading import PLACING, base_of, load_model, load_tokenizer
from parse.options import Parser, message_of, quieten
from parse.sources import find, read_recipe

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
PICKLES = (".bin", ".pt", ".pth")
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "final_logit_softcapping")  # of other models' logits


def main(arguments: list[str] | None = None) -> int:
    """Write the folder; returns the exit status."""
    parser = Parser("python -m parse fold", description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("run", help="a run folder, such as runs/quickstart")
    parser.add_argument("out", help="the folder to write; it must not be there yet")
    parser.add_argument("--target", default=argparse.SUPPRESS, help="default: the run's")
    parser.add_argument("--verifier", default=argparse.SUPPRESS, help="the folder of one of the kind `folded`")
    given = vars(parser.parse_args(arguments))
    try:
        quieten()
        recipe = read_recipe(Path(given["run"]))
        target, out = find("target", given, recipe), Path(given["out"])
        verifier = _folded_of(Path(find("verifier", given, recipe)))
        fold(target, verifier, out, recipe["engine"].get("target_options"))
    except Exception as error:
        if (message := message_of(error)) is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    print(f"{out}: serve this folder, and name it as the target: http://HOST:PORT/v1#MODEL, with --verifier {verifier}")
    return 0


def fold(target: str, verifier: Path, out: Path, options: dict[str, Any] | None = None) -> None:
    """Write a target's folder with a folded verifier's rows.

    Args:
        target: folder, hub id or PEFT folder; the latter is merged into its model first.
        verifier: the folder of a verifier of the kind `folded`.
        out: must not be there.
        options: of `from_pretrained`, as the run loads the target.

    Raises:
        ValueError: for a target whose head cannot hold the rows, or another one than the verifier was made for.
    """
    if out.exists():
        raise ValueError(f"{out} is there already: name another folder, or remove it")
    record = json.loads((verifier / "verifier.json").read_text())
    rows = load_file(verifier / "head.safetensors")["rows"]  # [R, D]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as place:
        source, made = _source(target, options or {}, Path(place)), Path(place) / "made"
        made.mkdir()
        _write(source, made, rows, record["labels"])
        made.chmod(0o755)
        made.rename(out)


def _folded_of(folder: Path) -> Path:
    """The folder itself or the one within of the kind `folded`."""
    for place in (folder, folder / "others" / "folded"):
        file = place / "verifier.json"
        if file.is_file() and json.loads(file.read_text()).get("kind") == "folded":
            return place
    raise ValueError(
        f"{folder} holds no verifier of the kind folded: set verifier.kind to best or folded in the recipe and run the "
        "stage `verifier` again"
    )


def _source(target: str, options: dict[str, Any], place: Path) -> Path:
    """A folder that holds the target's own whole weights."""
    if Path(target).is_dir() and not (Path(target) / "adapter_config.json").is_file() and "gguf_file" not in options:
        return Path(target)
    if not Path(target).is_dir():
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(target, revision=options.get("revision")))
    if "quantization_config" in options:
        raise ValueError(
            "the run's target is quantised when it is loaded, and a folder of it would not be: fold a target that is "
            "quantised on the disk"
        )
    options = {name: value for name, value in options.items() if name not in PLACING}
    kept = AutoConfig.from_pretrained(base_of(target)).dtype
    model = load_model(target, "cpu", kept if isinstance(kept, torch.dtype) else None, options=options)
    model.save_pretrained(place / "merged")
    load_tokenizer(model, options).save_pretrained(str(place / "merged"))
    return place / "merged"


def _write(source: Path, out: Path, rows: Tensor, labels: list[int]) -> None:
    content = json.loads((source / "config.json").read_text())
    embedding, head, tied = _names(source)
    files = _weight_map(source)
    _check(source, content, files, embedding, head, tied, labels)
    changed = {files[name] for name in (embedding, head) if name in files}
    for other in source.iterdir():
        if other.is_file() and other.name not in {*changed, "config.json", INDEX} and other.suffix not in PICKLES:
            _link(other.resolve(), out / other.name)
    for file in changed:
        tensors = load_file(source / file)
        if embedding in tensors:
            known = tensors[embedding]  # [V, D]
            if tied:  # the head gets a weight of its own
                tensors[head] = known.clone()
            tensors[embedding] = torch.cat([known, known.new_zeros(len(rows), known.shape[1])])
        if head in tensors:
            tensors[head] = torch.cat([tensors[head], rows.to(tensors[head].dtype)])
        bias = head.removesuffix("weight") + "bias"
        if bias in tensors:
            tensors[bias] = torch.cat([tensors[bias], tensors[bias].new_zeros(len(rows))])
        files |= dict.fromkeys(tensors, file)
        save_file(tensors, out / file, metadata={"format": "pt"})
        shutil.copymode(source / file, out / file)  # it is written for its owner alone
    if (source / INDEX).is_file():
        total = sum((out / file).stat().st_size for file in {*files.values()})
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for section in (content, content.get("text_config")):
        if isinstance(section, dict):
            section |= {"tie_word_embeddings": False}
            section |= {"vocab_size": labels[-1] + 1} if section is not content or "vocab_size" in section else {}
    content["folded_labels"] = labels
    (out / "config.json").write_text(json.dumps(content, indent=2) + "\n")


def _names(source: Path) -> tuple[str, str, bool]:
    """The names of the embedding's and of the head's weight, and whether they are one."""
    config = AutoConfig.from_pretrained(source)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    parts: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    modules = {id(module): name for name, module in model.named_modules()}
    embedding, head = (f"{modules[id(part)]}.weight" for part in parts)
    return embedding, head, parts[0].weight is parts[1].weight


def _weight_map(source: Path) -> dict[str, str]:
    """The file of each weight, by its name."""
    if (source / INDEX).is_file():
        return dict(json.loads((source / INDEX).read_text())["weight_map"])
    if not (source / WEIGHTS).is_file():
        raise ValueError(f"{source} holds no {WEIGHTS} and no {INDEX}: a folder with safetensors is needed")
    with safe_open(source / WEIGHTS, "pt") as file:
        return dict.fromkeys(file.keys(), WEIGHTS)


def _check(
    source: Path,
    content: dict[str, Any],
    files: dict[str, str],
    embedding: str,
    head: str,
    tied: bool,
    labels: list[int],
) -> None:
    """Refuse a target whose head cannot hold more rows."""
    lacking = [name for name in ([embedding] if tied else [embedding, head]) if name not in files]
    if lacking:
        like = sorted(name for name in files if name.startswith(head.removesuffix("weight")))
        kind = content.get("quantization_config", {}).get("quant_method", "another kind of weight")
        raise ValueError(
            f"{source}: its files hold no {lacking[0]}"
            + (f" but {', '.join(like[:3])}" if like else "")
            + f" ({kind}): rows cannot be added to a quantised head; keep the head as it is when quantising "
            "(modules_to_not_convert, ignore: lm_head)"
        )
    section = content.get("text_config", content)
    if scaled := [name for name in SCALES if section.get(name) not in (None, 1, 1.0)]:
        raise ValueError(
            f"{source}: its logits are changed by {', '.join(scaled)}, so that the rows would not tell what the "
            "verifier tells: use the kind `prompt`"
        )
    with safe_open(source / files[embedding], "pt") as file:
        vocabulary = file.get_slice(embedding).get_shape()[0]
    if labels != list(range(vocabulary, vocabulary + len(labels))):
        raise ValueError(
            f"{source} has {vocabulary} tokens, and the verifier's labels are {labels}: it was made for another target"
        )


def _link(file: Path, link: Path) -> None:
    """A hard link, or a symbolic one to another disk; where that has none, as for what was just merged, a copy."""
    try:
        os.link(file, link)
    except OSError:
        if file.stat().st_dev == link.parent.stat().st_dev:
            shutil.copy2(file, link)
        else:
            link.symlink_to(file)
