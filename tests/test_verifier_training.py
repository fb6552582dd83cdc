"""Trained verifiers: what learns, what is saved and loaded, and what stays as it was."""

import dataclasses
import random
from functools import partial

import pytest
import torch
from datasets import Dataset

from eval.verifier_metrics import Draft, Example, Scored, examine, measure
from parse import Engine
from parse.local.linear import FEW
from parse.local.model import packed_evidence
from parse.sampling import Written
from parse.scheduler import run
from parse.verifiers import Evidence, Needs, Probe
from parse.verifiers.adapter import suffix_of
from parse.verifiers.heads import AttentiveHead, HazardHead, segment_evidence, survival
from recipes.verifier_schema import ProbeSection
from tests.conftest import fresh_context, random_adapter, verify_prefixes
from tests.test_architectures import ARCHITECTURES, WITH_EXPERTS, make
from train.evidence import up_to_first_invalid
from train.probes import ProbeData, choose_layers, learning_curve
from train.verifier import candidates, choose, enough_of, held_out_every, labelled
from train.verifier_training import AdapterModule, ProbeModule, fit


def test_segment_evidence_is_of_the_segment_and_so_far():
    log_prob = torch.tensor([-1.0, -5.0, -2.0, -4.0])
    evidence = Evidence([2, 3], log_prob, -log_prob, 2 - log_prob)  # the end of sequence is the fourth
    first, second = segment_evidence(evidence)
    assert first.tolist() == [0, *[-5, -3, 5, 3, 7, 5] * 2]
    assert second.tolist() == [1, -4, -3, 4, 3, 6, 5, -5, -3, 5, 3, 7, 5]


def test_survival_never_rises():
    torch.testing.assert_close(survival(torch.tensor([0.0, 0.5, 0.1])), torch.tensor([0.0, 0.5, 0.6]).neg().exp())


def test_the_suffix_is_the_start_of_the_next_turn(tokenizer, smollm):
    assert tokenizer.decode(suffix_of(tokenizer, 2)) == "<|end|> <|user|>"
    assert smollm[1].decode(suffix_of(smollm[1], 4)) == "<|im_end|>\n<|im_start|>user"
    assert suffix_of(tokenizer, 1) == suffix_of(tokenizer, 2)[:1]


def test_training_asks_up_to_the_first_invalid_cut():
    draft = Draft([1], list(range(9)), [2, 5, 9], True, [True, False, False])
    assert up_to_first_invalid(draft) == dataclasses.replace(
        draft, ids=[0, 1, 2, 3, 4], ends=[2, 5], ended=False, valid=[True, False]
    )
    right = Draft([1], [5, 6], [1, 2], True, [True, True])
    assert up_to_first_invalid(right) == right


@pytest.mark.parametrize(("wrong", "right", "kept"), [(400, 2000, 600), (10, 2000, 500), (400, 300, 300), (0, 0, 0)])
def test_every_draft_that_goes_wrong_is_learnt_from_and_not_many_more_of_the_right_ones(wrong, right, kept):
    drafts = [Draft([1], [2, 3], [1, 2], True, [True, n >= wrong], number=n) for n in range(wrong + right)]
    random.Random(0).shuffle(drafts)
    chosen = enough_of(drafts)
    assert sum(not all(draft.valid) for draft in chosen) == wrong
    assert sum(all(draft.valid) for draft in chosen) == kept
    order = [draft.number for draft in chosen]
    assert order == [draft.number for draft in drafts if draft.number in {*order}]
    assert chosen == enough_of(drafts)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_adapter_leaves_what_was_read_bit_by_bit(name, tokenizer):
    """The same packed pass, with the LoRA on its suffixes and without: the same keys and values, other verdicts.

    Of more than `FEW` tokens: fewer lie otherwise in memory under the LoRA, and are equal but for rounding.
    """
    model = make(name)
    prompt, draft, ends, suffix = list(range(5, 17)), list(range(20, 20 + FEW)), [4, 9, FEW], [7, 8]
    caches, logits, states = [], [], []
    adapted = random_adapter(model, suffix).needs
    plain = Needs(token_logprobs=True, layers=(model.config.num_hidden_layers,), suffix_ids=tuple(suffix))
    engine = Engine(model, tokenizer, compile=False)
    for needs in (adapted, plain):
        context = fresh_context(engine)
        context.read(prompt)
        evidence, after = run(packed_evidence(context, Written(draft, ended=False), ends, needs))
        caches.append([part for layer in context.runner.cache.states(context.row) for part in layer])
        logits.append(after)
        states.append(evidence.suffix_states)
    # where suffixes choose other experts, these multiply other rows at a time: equal but for rounding
    same = partial(torch.allclose, atol=1e-5) if name in WITH_EXPERTS else torch.equal
    assert all(same(mine, plain) for mine, plain in zip(*caches, strict=True))
    assert same(*logits)
    assert states[0].shape == (3, model.config.hidden_size)


def test_one_packed_pass_gives_each_prefix_the_adapters_verdict_on_it_alone(target, tokenizer):
    engine = Engine(target, tokenizer, verifier=random_adapter(target, [7, 8]), compile=False)
    prompt, draft, ends = list(range(5, 17)), list(range(20, 33)), [4, 9, 13]
    together = engine.verify(prompt, draft, ends)
    hazards = []
    for k, end in enumerate(ends):  # each prefix as a draft of its own; the hazard of its last segment
        context = fresh_context(engine)
        context.read(prompt)
        evidence, _ = run(verify_prefixes(engine, context, draft[:end], ends[: k + 1], ended=False))
        hazards.append(engine.verifier.hazards(evidence)[-1])
    torch.testing.assert_close(together, survival(torch.stack(hazards)), atol=1e-4, rtol=1e-4)


def test_training_runs_what_the_engine_runs(target, tokenizer):
    """The module's hazards of packed rows without a cache are the engine's, after a prompt in the cache."""
    adapter = random_adapter(target, [7, 8])
    torch.nn.init.zeros_(adapter.head.body[-1].bias)  # hazards that are not all next to nothing
    engine = Engine(target, tokenizer, verifier=adapter, compile=False)
    drafts = [
        Draft(list(range(5, 17)), list(range(20, 33)), [4, 9, 13], False, [True] * 3),
        Draft(list(range(8, 13)), list(range(40, 47)), [3, 7], True, [True] * 2),
    ]
    examples = list(examine(engine, drafts, adapter.needs))
    module = AdapterModule(adapter.adapted, target, adapter.head, [7, 8])
    with torch.no_grad():
        trained = module(*module.collate(examples))
    mine = torch.cat([adapter.hazards(one.evidence) for one in examples])
    torch.testing.assert_close(trained, mine, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", [lambda: HazardHead(4, 4), lambda: AttentiveHead(4, 4, blocks=2)])
def test_a_batch_of_probes_is_each_probe_alone(make):
    torch.manual_seed(0)
    head = make()
    examples = []
    for n, ends in ((6, [2, 6]), (3, [3])):
        free = torch.randn(3, n + 1)
        evidence = Evidence(ends, *free, torch.randn(n, 4), context_states=torch.randn(9 - n, 4), layers=(1,))
        examples.append(Example(Draft([1], list(range(n)), ends, True, [True] * len(ends)), evidence))
    module = ProbeModule(head)
    alone = torch.cat([Probe(head, (1,)).hazards(one.evidence) for one in examples])
    torch.testing.assert_close(module(*module.collate(examples)), alone)


def asked(n, seed):
    """Drafts that have to say what stands before them: of three questions yes or no, one a segment."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for number in range(n):
        wanted = 2.0 * torch.randint(0, 2, (3,), generator=generator) - 1
        context, states = torch.zeros(3, 16), torch.zeros(9, 16)
        first = int(torch.randint(0, 6, (), generator=generator))
        for k in range(3):
            context[k, k], context[k, 3] = 3.0, 3 * wanted[k]
            segment = states[3 * k : 3 * k + 3]
            segment[:, 4 + k], segment[:, 7] = 3.0, 3 * (-wanted[k] if k == first else wanted[k])
        draft = Draft([1] * 3, list(range(9)), [3, 6, 9], False, [k < first for k in range(3)], number=number)
        evidence = Evidence([3, 6, 9], *torch.zeros(3, 9), states, context_states=context, layers=(1,))
        examples.append(Example(draft, evidence))
    return examples


def test_a_probe_with_attention_learns_what_stands_before_the_draft():
    """What no probe without can know: there it is a guess."""
    aucs = []
    for blocks in (0, 2):
        torch.manual_seed(0)
        section = ProbeSection(epochs=8, learning_rate=3e-3, blocks=blocks)
        probe = probe_of(asked(500, 1), asked(50, 2), section)
        scored = [Scored(one.draft, probe.confidences(one.evidence).tolist()) for one in asked(200, 3)]
        aucs.append(measure(scored, 0.5)["auc"])
    assert aucs[0] < 0.7 < 0.85 < aucs[1]


def probe_of(fitted, held_out, section, layers=(1,)):
    return Probe(ProbeData(fitted, held_out, layers, section, 0.01).fit().module.head, layers)


def planted(n, seed):
    """Drafts of which the states say, with some noise, where they go wrong."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for number in range(n):
        ends = [3, 6, 9]
        first = int(torch.randint(0, 8, (), generator=generator))
        states = torch.randn(9, 16, generator=generator)
        if first < 3:
            states[first * 3 + 1, 0] += 9
        valid = [k < first for k in range(3)]
        draft = Draft([1], list(range(9)), ends, False, valid, number=number)
        examples.append(Example(draft, Evidence(ends, *torch.zeros(3, 9), states, layers=(1,))))
    return examples


def test_a_probe_learns_where_drafts_go_wrong():
    torch.manual_seed(0)
    section = ProbeSection(epochs=8, learning_rate=1e-2, blocks=0)
    probe = probe_of(planted(120, 1), planted(30, 2), section)
    fresh = planted(100, 3)
    scored = [Scored(one.draft, probe.confidences(one.evidence).tolist()) for one in fresh]
    assert measure(scored, 0.5)["auc"] > 0.97


def test_the_best_epoch_is_kept_by_what_may_be_accepted(monkeypatch):
    """Not the last one, and not the one of the least loss."""
    script, seen, modules = iter([0.2, 0.9, 0.5, 0.9]), [], []

    def make():
        modules.append(ProbeModule(HazardHead(16, 4)))
        return modules[-1]

    def accepted(scored, max_accuracy_loss):
        seen.append(modules[0].head.body[0].weight.detach().clone())
        return next(script)

    monkeypatch.setattr("train.verifier_training.acceptable", accepted)
    monkeypatch.setattr(
        "train.verifier_training.survival_loss", lambda hazards, *_: hazards.sum() * 0 + hazards.mean() + len(seen)
    )
    kept = fit(make, planted(40, 1), planted(12, 2), ProbeSection(epochs=4, blocks=0), 0.01, "probe").module
    assert torch.equal(kept.head.body[0].weight, seen[1])  # of two as good the one of the lower loss
    assert not torch.equal(seen[1], seen[3])


def test_training_stops_where_it_has_not_been_better_for_long(monkeypatch):
    script = iter([0.2, 0.9, 0.5, 0.8, 0.95])
    monkeypatch.setattr("train.verifier_training.acceptable", lambda *_: next(script))
    section = ProbeSection(epochs=30, blocks=0, patience=2)
    found = ProbeData(planted(40, 1), planted(12, 2), (1,), section, 0.01).fit()
    assert (found.acceptable, found.epochs) == (0.9, 4)


def two_layers(n, seed):
    """The same, with the states of a layer that knows nothing in front."""
    generator = torch.Generator().manual_seed(seed + 100)
    noise = [torch.randn(9, 16, generator=generator) for _ in range(n)]
    return [
        dataclasses.replace(
            one,
            evidence=dataclasses.replace(
                one.evidence, states=torch.cat([mine, one.evidence.states], dim=-1), layers=(3, 5)
            ),
        )
        for one, mine in zip(planted(n, seed), noise, strict=True)
    ]


def test_layers_are_chosen_by_what_they_know_of_held_out_prompts():
    torch.manual_seed(0)
    section = ProbeSection(epochs=40, learning_rate=1e-2, blocks=0)
    chosen, fitted = choose_layers(ProbeData(two_layers(200, 1), two_layers(80, 2), (3, 5), section, 0.01))
    assert 5 in chosen.layers
    assert fitted.module.head.sizes["layers"] == len(chosen.layers)
    one = ProbeData(two_layers(3, 1), two_layers(3, 2), (3, 5), section, 0.01).of_layer(5)
    assert torch.equal(one.train_set[2].evidence.states, planted(3, 1)[2].evidence.states)
    assert one.layers == (5,)


def test_the_learning_curve_tells_what_more_prompts_would_give():
    torch.manual_seed(0)
    data = ProbeData(planted(200, 1), planted(80, 2), (1,), ProbeSection(epochs=8, learning_rate=1e-2, blocks=0), 0.01)
    curve = learning_curve(data, data.fit())
    assert [row["prompts"] for row in curve] == [50, 100, 200]
    assert curve[0]["loss"] > curve[-1]["loss"]


def test_the_promised_loss_is_more_than_one_held_out_prompt_where_there_are_enough():
    assert held_out_every(2000, 0.01) == 6  # 333: a sixth
    assert held_out_every(600, 0.01) == 3  # 200: two make up a percent
    assert held_out_every(90, 0.01) == 3  # a third, and no more
    assert held_out_every(1, 0.01) == 3


@pytest.mark.parametrize(("prompts", "aside"), [(30, 10), (4, 2), (2, 1)])
def test_held_out_are_prompts_of_training_with_the_drafts_that_the_engine_meets(prompts, aside):
    """Drafts of disturbed copies are learnt from too; of prompts that decide, none is learnt from."""
    row = {"prompt_ids": [1], "prefix_ids": [], "draft_ids": [2], "ends": [1], "ended": True, "valid": [True]}
    row |= {"target_right": True, "round": 0}
    rows = [
        {**row, "split": split, "number": number, "met": met}
        for number, split in enumerate(["calibration"] * 2 + ["test"] * 2 + ["train"] * prompts)
        for met in ((True, False) if split == "train" else (True,))
    ]
    drafts = labelled(Dataset.from_list(rows), 0.01)
    assert [len(drafts[split]) for split in ("calibration", "test")] == [2, 2]
    held_out, learnt = ({one.number for one in drafts[split]} for split in ("held_out", "train"))
    assert len(held_out) == aside
    assert held_out | learnt == set(range(4, 4 + prompts))
    assert not held_out & learnt
    assert all(one.met for one in drafts["held_out"])
    assert sum(not one.met for one in drafts["train"]) == prompts - aside


def test_a_head_reads_each_layer_at_its_own_scale():
    """What one layer says is heard beside another that is a thousand times larger."""
    head = HazardHead(8, 4, layers=2)
    states, free = torch.randn(5, 8), torch.zeros(5, 4)
    louder = torch.cat([states[:, :4], 1000 * states[:, 4:]], dim=-1)
    torch.testing.assert_close(head(states, free), head(louder, free), atol=1e-4, rtol=1e-3)
    assert HazardHead(**head.sizes).sizes == head.sizes
    assert head(torch.full((1, 8), torch.inf), free[:1]).isfinite().all()


def test_a_loss_that_is_not_finite_stops_with_its_place():
    broken = planted(20, 1)
    broken[7].evidence.states[:] = torch.nan
    with pytest.raises(
        FloatingPointError, match=r"the probe's loss is nan at step \d+ of 4, on drafts .*7.*learning_rate"
    ):
        probe_of(broken, planted(9, 2), ProbeSection(epochs=2, blocks=0))


def test_the_kind_that_may_accept_most_is_chosen_of_those_that_the_engine_can_run():
    def scores(good):
        right = Scored(Draft([1], [1, 2], [1, 2], True, [True, True], number=0), [0.9, 0.8 if good else 0.1])
        wrong = Scored(Draft([1], [1, 2], [1, 2], True, [True, False], number=1), [0.9, 0.3])
        return {"held_out": [right, wrong]}

    kinds = {"likelihood mean prefix": scores(False), "divergence lowest prefix": scores(True), "probe": scores(True)}
    assert candidates("best", kinds) == ["likelihood mean prefix", "probe"]
    assert candidates("likelihood", kinds) == ["likelihood mean prefix"]
    assert candidates("probe", kinds) == ["probe"]
    assert choose({name: kinds[name] for name in candidates("best", kinds)}, 0.01) == "probe"
    assert choose({"probe": {}}, 0.01) == "probe"  # nothing to choose, nothing to score


def test_of_kinds_that_may_accept_as_much_the_one_nearest_to_the_labels_is_chosen():
    """Whichever stands first in the report."""
    right, wrong = (Draft([1], [1, 2], [1, 2], True, [True, last], number=last) for last in (True, False))
    sure, unsure = ({"held_out": [Scored(right, [0.9, 0.8]), Scored(wrong, [0.9, low])]} for low in (0.1, 0.7))
    assert choose({"prompt": unsure, "probe": sure}, 0.01) == "probe"
    assert choose({"prompt": sure, "probe": unsure}, 0.01) == "prompt"


def test_nothing_to_learn_from_is_said():
    with pytest.raises(ValueError, match=r"no labelled drafts to learn from .*raise rollouts\.train"):
        probe_of([], planted(3, 1), ProbeSection(blocks=0))
