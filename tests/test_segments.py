"""Cuts: where sentences, lines and fixed steps end, in texts of many kinds and languages."""

# ruff: noqa: RUF001

import re
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import parse.segments
from parse.segments import check_segmenter, cut, ends_segment
from parse.text import encode_continuation, encode_text, text_of
from tests.test_tokenizers import unigram  # noqa: F401

# Each text with a stroke where it may be cut.
TEXTS = {
    "English": "Tea is ready.¦ Do you want some?¦ Yes, please!¦ It is (I think) green.¦ So... what now?¦ Well...¦ Sit.",
    "German": "Am 3. Mai kam Dr. Kern, d. h. zu spät.¦ Er zahlte ca. 40 Euro, vgl. Abb. 2.¦ Wie schön!¦ "
    "Im 19. Jahrhundert galt das z. B. nicht.¦ Warum?¦ „Darum.“¦ Gut.",
    "French": "M. Petit arrive à 8 h.¦ Vraiment ?¦ « Oui ! » dit-il.¦ « Bien sûr. »¦ Il part… puis il revient…¦ Fin.",
    "Spanish": "El Sr. Gil vino ayer.¦ ¿Por qué?¦ ¡No lo sé!¦ Vive en EE. UU. desde 1990.¦ "
    "—¿Sola? —preguntó ella.¦ Sí.",
    "Russian": "На ул. Мира, т. е. в центре.¦ Там жил А. С. Попов, см. рис. 4.¦ «Да!» — сказал он.¦ Почему?¦ Так.",
    "Chinese": "今天下雨。¦我们不去公园！¦你想喝茶吗？¦价格是3.14元。¦他说：“好的。”¦然后走了……再也没来。¦"
    "真的?!¦好!¦完",
    "Japanese": "雨です。¦３．５キロ走る？¦「本当？」と彼は聞いた。¦「はい。」¦（終わり。）¦バージョン2.0です｡¦次へ",
    "Korean": "비가 옵니다.¦ 값은 3.5달러입니다.¦ 정말요?¦ 네!¦ 갑시다.",
    "Hindi": "बारिश हो रही है।¦ क्या तुम आओगे?¦ डॉ. राव आए।¦वे बैठे॥¦ ठीक है",
    "Arabic": "هل أنت هناك؟¦ نعم، أنا هنا.¦ انتظر!¦ حسنا۔¦ شكرا",
    "Thai": "ฝนตกหนัก¦ เราอยู่บ้าน 3 วัน¦ เด็ก ๆ เล่นเกม\n¦พรุ่งนี้ไปตลาด",
    "other scripts": "Բարեւ։¦ Ինչպե՞ս ես։¦ ሰላም።¦ደህና ነህ፧¦ នេះល្អ។¦បាទ។¦ გამარჯობა.¦ როგორ ხარ?¦ კარგად.",
    "abbreviations": "Dr. Lee and J. R. R. Ames of the U.S. Army met at St. Ives, e.g. on Jan. 5, cf. Fig. 3 and "
    "No. 7 vs. No. 8 (approx. there).¦ No.¦ Not in Dec.¦ They met, etc.¦ Bye.",
    "numbers": "It costs $3.14, not $3.¦ Pay 1,000.50 now.¦ The sum is 42.¦ Then 7!¦ "
    " Is 5! = 120?¦ It is -5.¦ -5 is odd.",
    "names": "Run main.py or foo.bar() now.¦ Use v2.0.1 and not v2.¦ See https://a.org/b.html?c=d.¦ "
    "Or www.a.org, a@b.de.¦ Done.",
    "dialogue": '"I am here," she said.¦ "Where?" he asked.¦ "There!"¦ \'Go.\'¦ "No!" – she left.¦ (He too.)¦ '
    "Why?!¦ Oh.",
    "numbered list": "Steps:\n¦1. Mix it. ¦Wait.\n¦2. Bake at 180.5 degrees.\n   ¦a. Turn it.\n   ¦b) Look.\n\n"
    "¦10. Eat.\n¦Step 3. Sleep.",
    "bulleted list": "Buy:\n¦- Milk. ¦Two.\n¦* Tea\n¦• Jam!\n\n¦+ Salt",
    "Markdown": "# Part 1.2 of it\n\n¦**It is so.**¦ Then _this one._\n¦**1.** And.\n¦> So\n\n"
    "¦| a | b. |\n¦|---|\n¦| c. |",
    "emoji": "Great! 😊¦ Go on.¦ Nice!👩‍🚀¦ Good 👍🏽 one.¦ Done. ✅\n¦🎉 Wow",
    "code": "Use:\n¦```python\n¦# Add. Then stop\n¦x = 3. \n\n    ¦print('No. Yes? ')\n¦```\n"
    "¦Call `a. B` or `c.d`.¦ It works.",
    "formulas": "So $x = 1. Y$ holds.¦ It costs $5.¦ Or $6. ¦Let \\(a. B\\) be.¦ \\[\n x = 2. Y\n\\]\n"
    "¦Then $5. X = y$ and $$a\n. B$$ or $n! = 6$ hold.¦ Now \\begin{align*}\na. B\n\\end{align*} ends.¦ Ok.",
    "left open": "It is `a. B\n¦and $x. Y\n¦or \\[ a. B\nc\n\n¦So. ¦End\n¦~~~\n¦a. B\n¦c. D",
}


@pytest.fixture(scope="session")
def bytes_and_pieces(smollm, unigram):  # noqa: F811
    """SmolLM2's tokenizer, of merged bytes, and one of SentencePiece's kind."""
    return smollm[1], unigram


@pytest.fixture(params=[0, 1], ids=["bytes", "pieces"])
def speaker(request, bytes_and_pieces):
    return bytes_and_pieces[request.param]


@pytest.fixture
def glued():
    """Makes a tokenizer of these tokens."""

    def make(words):
        backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *words])}, unk_token="?"))
        backend.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(tokenizer_object=backend)

    return make


def pieces(ids, tokenizer, segmenter="sentence"):
    ends = cut(ids, tokenizer, segmenter)
    texts = [text_of(ids[:end], tokenizer) for end in [0, *ends]]
    return [after[len(before) :] for before, after in pairwise(texts)]


@pytest.mark.parametrize("kind", TEXTS)
def test_sentences_of_many_kinds_of_text(speaker, kind):
    ids = encode_text(TEXTS[kind].replace("¦", ""), speaker)
    found = pieces(ids, speaker)
    assert "".join(found) == text_of(ids, speaker)
    assert [piece.strip() for piece in found] == [piece.strip() for piece in TEXTS[kind].split("¦")]


def test_lines(speaker):
    text = "First. Second\n\n  third:\r\n\tfourth $$\nfifth"
    ids = encode_text(text, speaker)
    assert [piece.strip() for piece in pieces(ids, speaker, "line")] == [
        "First. Second",
        "third:",
        "fourth $$",
        "fifth",
    ]


def test_cuts_stand_between_tokens(glued):
    """A mark may share its token with quotes and space after it, or with the next sentence, which is then not cut."""
    words = ["「はい", "。」", "彼は", "行く。\n", "雨。新", "しい。", " ", "\n\n", "Tea", ".\n\n", "So", ".", "1", "4"]
    tokenizer = glued(words)
    found = pieces(tokenizer.convert_tokens_to_ids(words), tokenizer)
    assert found == ["「はい。」", "彼は行く。\n", "雨。新しい。 \n\n", "Tea.\n\n", "So.14"]


@given(ids=st.lists(st.one_of(st.integers(5, 171), st.sampled_from([115])), max_size=60))
def test_in_the_tasks_sentences_every_full_stop_ends_one(tokenizer, ids):
    """Word by word, whatever the words: the shipped verifier was trained on these cuts."""
    stops = set(tokenizer.convert_tokens_to_ids([".", "?"]))
    ends = [k + 1 for k in range(len(ids) - 1) if ids[k] in stops]
    assert tokenizer.convert_tokens_to_ids(".") == 115
    assert cut(ids, tokenizer) == [*ends, len(ids)][: len(ids)]
    assert all(ends_segment(ids[:k], tokenizer) == (ids[k - 1] in stops) for k in range(1, len(ids) + 1))
    assert cut(ids, tokenizer, "line") == [len(ids)][: len(ids)]


@given(ids=st.lists(st.integers(5, 171), max_size=60), step=st.integers(1, 9))
def test_steps_of_a_number_of_tokens(tokenizer, ids, step):
    ends = cut(ids, tokenizer, step)
    assert ends[-1:] == ([len(ids)] if ids else [])
    assert all(b - a == step for a, b in zip([0, *ends], ends[:-1], strict=False))


PARTS = [part for text in TEXTS.values() for part in re.split(r"¦|(?<=\W)", text) if part]


@settings(max_examples=150, deadline=None)
@given(
    parts=st.lists(st.one_of(st.sampled_from(PARTS), st.text(max_size=3)), min_size=1, max_size=14),
    segmenter=st.sampled_from(["sentence", "line"]),
)
@example(parts=["It is 42.", " नमस्ते"], segmenter="sentence")
@example(parts=["Where?", "  ", "Tea "], segmenter="sentence")
@example(parts=["Բարեւ։", "Բարեւ։", " ", "Tea "], segmenter="sentence")
def test_a_text_being_written_stops_where_it_is_cut_later(bytes_and_pieces, parts, segmenter):
    """What docs/segments.md promises: no cut is missed, and none is made that a new sentence would not confirm."""
    for tokenizer in bytes_and_pieces:
        ids = encode_text("".join(parts).encode("utf-8", "ignore").decode(), tokenizer)
        ends = cut(ids, tokenizer, segmenter)
        assert ends == sorted({*ends, len(ids)} - {0})
        stops = {end for end in range(len(ids) + 1) if ends_segment(ids[:end], tokenizer, segmenter)}
        partial = {end for end in range(len(ids) + 1) if text_of(ids[:end], tokenizer).endswith("\ufffd")}
        whole = [end for end in range(len(ids) + 1) if end not in partial]
        assert not stops & partial
        for end in ends[:-1]:
            assert end in stops or whole[whole.index(end) + 1] in stops
        follows = encode_continuation(" The cat sat.", tokenizer)
        for end in stops:
            confirmed = cut([*ids[:end], *follows], tokenizer, segmenter)
            assert end in confirmed or whole[whole.index(end) - 1] in confirmed


@pytest.mark.parametrize(
    ("written", "more", "stops"),
    [
        ("That is it", ".", True),
        ("That is 4", ".", False),
        ("That is 4.", " Then", True),
        ("That is 4.", "1", False),
        ("So. Then", " we", False),
        ("See Dr", ".", False),
        ("1", ".", False),
        ("雨です", "。", True),
        ("ठीक है", "।", True),
        ("`a", ".", False),
        ("```\nx = f()", "\n", True),
        ("\\[ x", "\n", False),
        ("", "\n\n", False),
    ],
)
def test_a_text_being_written(speaker, written, more, stops):
    before, after = encode_text(written, speaker), encode_continuation(more, speaker)
    assert any(ends_segment([*before, *after[:k]], speaker) for k in range(1, len(after) + 1)) is stops


def test_a_text_being_written_is_read_whole_only_where_a_sentence_may_end(smollm, monkeypatch):
    tokenizer = smollm[1]
    ids = encode_text("It is a long (and quite dull) way from here to there. " * 20, tokenizer)
    ends_segment(ids, tokenizer)
    read = []
    decode = lambda ids, tokenizer: read.append(len(ids)) or text_of(ids, tokenizer)
    monkeypatch.setattr(parse.segments, "text_of", decode)
    for end in range(len(ids)):
        ends_segment(ids[:end], tokenizer)
    assert sum(length > 16 for length in read) <= 2 * 2 * 20


def test_steps_of_a_text_being_written(tokenizer):
    ids = tokenizer.encode("that is 4 coins .")
    assert ends_segment(ids, tokenizer, 5)
    assert not ends_segment(ids, tokenizer, 6)
    assert not ends_segment([], tokenizer, "line")
    assert cut([], tokenizer) == []


@pytest.mark.parametrize("segmenter", ["word", 0, -3, True, 1.5, None])
def test_other_segmenters_are_refused(segmenter):
    with pytest.raises(ValueError, match="not a segmenter"):
        check_segmenter(segmenter)
