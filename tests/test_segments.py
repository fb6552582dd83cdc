"""Cuts: where sentences, lines and fixed steps end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parse.segments import check_segmenter, cut, ends_segment


def test_sentences_of_the_task(tokenizer):
    ids = tokenizer.encode("the fig of rome costs us 4 coins , which makes 4 coins so far . that is 4 coins .")
    ends = cut(ids, tokenizer, "sentence")
    assert [tokenizer.decode(ids[:e])[-1] for e in ends] == [".", "."]
    assert len(ends) == 2
    assert ends[-1] == len(ids)


@given(ids=st.lists(st.integers(5, 171), max_size=60), step=st.integers(1, 9))
@pytest.mark.parametrize("named", ["sentence", "line", None])
def test_ends_increase_and_cover_the_draft(tokenizer, ids, step, named):
    ends = cut(ids, tokenizer, named or step)
    assert ends == sorted(set(ends))
    assert ends[-1:] == ([len(ids)] if ids else [])
    if named is None and ids:
        assert all(b - a == step for a, b in zip([0, *ends], ends[:-1], strict=False))


def test_sentences_and_lines_of_real_text(smollm):
    tokenizer = smollm[1]
    text = 'He paid 3.50 in all. "Really?" she said!\n\nThen: e = mc2.\nDone'
    ids = tokenizer.encode(text, add_special_tokens=False)

    def pieces(segmenter):
        ends = cut(ids, tokenizer, segmenter)
        return [tokenizer.decode(ids[a:b]) for a, b in zip([0, *ends], ends, strict=False)]

    assert "".join(pieces("sentence")) == text
    assert pieces("sentence")[0] == "He paid 3.50 in all."
    assert len(pieces("sentence")) == 5
    assert "".join(pieces("line")) == text
    assert len(pieces("line")) == 3


def test_a_text_being_written_ends_a_segment_at_its_closer(tokenizer):
    ids = tokenizer.encode("that is 4 coins .")
    assert ends_segment(ids, tokenizer, "sentence")
    assert not ends_segment(ids[:-1], tokenizer, "sentence")
    assert ends_segment(ids, tokenizer, 5)
    assert not ends_segment(ids, tokenizer, 6)
    assert not ends_segment([], tokenizer, "line")


@pytest.mark.parametrize("segmenter", ["word", 0, -3, True, 1.5, None])
def test_other_segmenters_are_refused(segmenter):
    with pytest.raises(ValueError, match="not a segmenter"):
        check_segmenter(segmenter)
