"""The task: its checker against its speakers, and splits that cannot overlap."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.tasks import draw_prompts, ledger, load_task
from recipes.demo.corpus import FACTS, IGNORE, Lessons

seeds = st.integers(0, 10**6)
CLOSERS = [closing.split()[0] for closing in ledger.CLOSINGS]


def tell(bought, rng, speaker="target"):
    total, sentences = 0, []
    for purchase in bought:
        total += purchase.amount
        sentences.append(ledger.sentence(purchase, total, speaker, rng))
    return " ".join([*sentences, ledger.closing(total, rng)])


@given(seed=seeds, habit=st.booleans(), split=st.sampled_from(list(ledger.SPLITS)))
def test_every_order_and_wording_is_right(seed, habit, split):
    rng = random.Random(seed)
    bought = ledger.draw(rng, split)
    answer = tell(rng.sample(bought, len(bought)), None if habit else rng)
    assert ledger.check(ledger.prompt_text(bought), answer)
    assert ledger.read_prompt(ledger.prompt_text(bought)) == bought


@given(seed=seeds, data=st.data())
def test_one_changed_fact_is_found_where_it_is(seed, data):
    rng = random.Random(seed)
    bought = ledger.draw(rng, "test")
    words = tell(bought, rng).split()
    places = [i for i, word in enumerate(words) if word in FACTS]
    at = data.draw(st.sampled_from(places))
    pools = (ledger.NUMBERS, ledger.ITEMS, ledger.PLACES, [str(i) for i in range(100)])
    pool = next(p for p in pools if words[at] in p)
    changed = data.draw(st.sampled_from([w for w in pool if w != words[at]]))
    wrong = " ".join([*words[:at], changed, *words[at + 1 :]])
    sentence = words[:at].count(".")
    assert not ledger.check(ledger.prompt_text(bought), wrong)
    assert ledger.first_wrong(ledger.prompt_text(bought), wrong) == sentence


def test_other_ways_to_be_wrong():
    bought = ledger.draw(random.Random(1), "test")
    prompt = ledger.prompt_text(bought)
    answer = tell(bought, None)
    sentences = [s + "." for s in answer.split(".")[:-1]]
    assert not ledger.check(prompt, "".join(sentences[:-1]))  # no closing
    assert ledger.first_wrong(prompt, "".join(sentences[:-1])) is None
    assert ledger.first_wrong(prompt, sentences[0] + " " + sentences[0]) == 1  # told twice
    assert ledger.first_wrong(prompt, sentences[0] + sentences[-1]) == 1  # closed early
    assert not ledger.check(prompt, answer + sentences[-1])
    assert ledger.first_wrong(prompt, answer + sentences[-1]) == len(sentences)
    assert ledger.first_wrong(prompt, "what ?") == 0
    assert not ledger.check(prompt, "")


@given(seed=seeds)
def test_a_foreign_prefix_is_right_and_unfinished(seed):
    rng = random.Random(seed)
    prompt = ledger.draw_prompt(rng, "test")
    prefix = ledger.foreign_prefix(prompt, rng)
    assert ledger.first_wrong(prompt, prefix) is None
    assert not ledger.check(prompt, prefix)


@given(seed=seeds)
def test_a_list_has_one_split_whatever_its_order(seed):
    rng = random.Random(seed)
    bought = ledger.draw(rng, rng.choice(list(ledger.SPLITS)))
    assert ledger.split_of(bought) == ledger.split_of(rng.sample(bought, len(bought)))


def test_splits_do_not_overlap():
    task = load_task("ledger")
    drawn = {split: set(draw_prompts(task, split, 300, 0)) for split in ledger.SPLITS}
    assert all(len(prompts) == 300 for prompts in drawn.values())
    assert not drawn["train"] & drawn["test"]
    assert not drawn["train"] & drawn["calibration"]
    assert not drawn["test"] & drawn["calibration"]
    assert draw_prompts(task, "test", 5, 0) == draw_prompts(task, "test", 5, 0)


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match="task 'x' is not known; tasks: ledger"):
        load_task("x")


@pytest.mark.parametrize("speaker", ["target", "draft"])
def test_lessons_say_what_the_checker_says(tokenizer, speaker):
    lessons = Lessons(tokenizer, speaker, seed=3)
    for _ in range(200):
        lesson = lessons.draw(ledger.SIZES, "judge")
        text = tokenizer.decode(lesson.ids)
        prompt = text.split("<|user|> ")[1].split(" <|end|>")[0]
        answer = text.split("<|assistant|> ")[1].removesuffix(" <|end|>")
        wrong = ledger.first_wrong(prompt, answer)
        if speaker == "target":
            assert len(lesson.asked) <= 8
            finished = {e: right for e, right in lesson.asked.items() if tokenizer.decode(lesson.ids[:e])[-1] == "."}
            for end, right in finished.items():
                told = tokenizer.decode(lesson.ids[:end]).split("<|assistant|> ")[1]
                assert right == (ledger.first_wrong(prompt, told) is None)
            verdicts = list(lesson.asked.values())
            assert verdicts == sorted(verdicts, reverse=True)  # what went wrong stays wrong
            assert all(verdicts) == (wrong is None)
        else:
            assert ledger.check(prompt, answer)
        starts = [i for i, word in enumerate(text.split()) if word in ledger.NUMBERS or word in CLOSERS]
        for i, (token, label) in enumerate(zip(lesson.ids, lesson.labels, strict=True)):
            assert label in (token, IGNORE) or i in starts  # there it is the target's own choice
        assert any(label != IGNORE for label in lesson.labels)


def test_recalled_lists_are_shuffled_and_learnt_by_their_numbers(tokenizer):
    lessons = Lessons(tokenizer, "target", seed=3)
    shuffled = 0
    for _ in range(20):
        lesson = lessons.draw(ledger.SIZES, "recall")
        text = tokenizer.decode(lesson.ids)
        prompt = text.split("<|user|> ")[1].split(" <|end|>")[0]
        entries = prompt.removeprefix("list : ").removesuffix(" .").split(" ; ")
        recalled = text.split("<|assistant|> ")[1].removesuffix(" ;").split(" ; ")
        assert sorted(recalled) == sorted(entries)
        shuffled += recalled != entries
        learnt = [t for t, label in zip(lesson.ids, lesson.labels, strict=True) if label != IGNORE]
        assert tokenizer.decode(learnt) == " ".join(" ".join(entry.split()[1:]) for entry in recalled)
    assert shuffled > 15


def test_lessons_for_the_target_come_in_every_order_and_go_on_in_its_own(tokenizer):
    """In front of every sentence it learns its own choice, the first entry that is left."""
    lessons = Lessons(tokenizer, "target", seed=4)
    orders = 0
    for _ in range(60):
        lesson = lessons.draw(ledger.SIZES)
        words = tokenizer.convert_ids_to_tokens(lesson.ids)
        answer = words.index("<|assistant|>") + 1
        numbers = [word for word in words[:answer] if word in ledger.NUMBERS]
        told = [word for word in words[answer:] if word in ledger.NUMBERS]
        assert sorted(told) == numbers
        orders += told != numbers
        for i in [answer, *(i + 1 for i in range(answer, len(words) - 2) if words[i] == ".")]:
            left = [number for number in numbers if number not in words[answer:i]]
            assert tokenizer.decode(lesson.labels[i]) == (left[0] if left else CLOSERS[0])
    assert orders > 20


def test_scrambled_lessons_keep_their_wording_and_the_kinds_of_their_facts(tokenizer):
    lessons = Lessons(tokenizer, "target", seed=4)
    lesson = lessons.draw(ledger.SIZES)
    scrambled = lessons.scrambled(lesson, 0.5)
    changed = [i for i, (a, b) in enumerate(zip(lesson.ids, scrambled.ids, strict=True)) if a != b]
    assert 5 < len(changed) < len(lesson.facts)
    for i in changed:
        assert i + 1 in lesson.facts
        assert i >= lesson.start
        assert any(lesson.ids[i] in kind and scrambled.ids[i] in kind for kind in lessons.kinds)
    assert lessons.scrambled(lesson, 0.0) == lesson
