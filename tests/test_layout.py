"""The packed pass equals K separate passes; the mask shows what DESIGN says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parse.layout import pack, stack_layouts, visible
from parse.local.runner import ModelRunner, Pass
from tests.conftest import random_model


def test_mask_of_the_documented_example():
    layout = pack([10, 11, 12, 13, 14, 15], [2, 4, 6], [20, 21], past=3)
    assert layout.positions == [3, 4, 5, 6, 7, 8, 5, 6, 7, 8, 9, 10]
    assert layout.last_suffix == [7, 9, 11]
    rows = ["".join("#" if seen else "." for seen in row) for row in layout.mask().tolist()]
    assert rows[0] == "####..........."
    assert rows[5] == "#########......"
    assert rows[6] == "#####....#....."
    assert rows[7] == "#####....##...."
    assert rows[8] == "#######....#..."
    assert rows[11] == "#########....##"


@pytest.mark.parametrize("ends", [[3, 2], [0], [2, 2], [1, 7]])
def test_ends_outside_the_draft_are_refused(ends):
    with pytest.raises(ValueError, match="prefix ends"):
        pack([1, 2, 3], ends, [4])


ends_of = st.integers(1, 24).flatmap(
    lambda n: st.tuples(st.just(n), st.sets(st.integers(1, n)).map(lambda cuts: sorted(cuts | {n})))
)


@settings(max_examples=12, deadline=None)
@given(case=ends_of, past=st.integers(1, 12), suffix=st.integers(0, 4), data=st.data())
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_packed_pass_equals_separate_passes(kind, case, past, suffix, data):
    n, ends = case
    model = MODELS[kind]
    tokens = st.lists(st.integers(0, 59), min_size=past + n + suffix, max_size=past + n + suffix)
    drawn = data.draw(tokens)
    prompt, draft, tail = drawn[:past], drawn[past : past + n], drawn[past + n :]
    runner, layout = ModelRunner(model), pack(draft, ends, tail, past)
    runner.forward([Pass(runner, 0, prompt)])
    logits = runner.forward([Pass(runner, 0, layout.ids, layout, range(len(layout.ids)))])[0].logits
    with torch.inference_mode():
        plain = model(torch.tensor([prompt + draft])).logits[0, past:]
        torch.testing.assert_close(logits[:n], plain, atol=1e-4, rtol=1e-4)
        if suffix:
            for end, index in zip(ends, layout.last_suffix, strict=True):
                alone = model(torch.tensor([prompt + draft[:end] + tail])).logits[0, -1]
                torch.testing.assert_close(logits[index], alone, atol=1e-4, rtol=1e-4)


def test_stacked_rows_equal_rows_alone():
    model = MODELS["llama"]
    rows = [pack([1, 2, 3, 4, 5], [2, 5], [7, 8]), pack([9, 8, 7], [3], [7, 8])]
    ids, positions, *numbers = stack_layouts(rows)
    mask = visible(*numbers, positions, keys=ids.shape[1])[:, None]
    with torch.inference_mode():
        logits = model(ids, position_ids=positions, attention_mask=mask).logits
        for b, row in enumerate(rows):
            own, positions = row.mask()[None, None], torch.tensor([row.positions])
            single = model(torch.tensor([row.ids]), position_ids=positions, attention_mask=own).logits[0]
            torch.testing.assert_close(logits[b, : single.shape[0]], single, atol=1e-4, rtol=1e-4)


def test_rows_over_a_cache_cannot_be_stacked():
    with pytest.raises(ValueError, match="without a cache"):
        stack_layouts([pack([1], [1], [2], past=3)])


MODELS = {kind: random_model(kind, 60) for kind in ("llama", "gpt2")}


@given(data=st.data(), n=st.integers(1, 12), s=st.integers(1, 3), padding=st.integers(0, 5))
def test_suffixes_alone_see_what_they_see_after_the_text(data, n, s, padding):
    """And nothing of the padding between the text in the cache and themselves."""
    ends = sorted(data.draw(st.sets(st.integers(1, n), min_size=1)))
    packed = pack(list(range(n)), ends, [7] * s)
    alone, after = packed.suffixes(after=n + padding), n + padding
    together = packed.mask()
    mask = alone.mask()
    assert torch.equal(mask[:, :n], together[n:, :n])
    assert not mask[:, n:after].any()
    assert torch.equal(mask[:, after:], together[n:, n:])
    assert alone.positions == packed.positions[n:]
    assert [n + index for index in alone.last_suffix] == packed.last_suffix
