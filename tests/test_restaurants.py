"""The restaurants task: what a text states, what is wrong with an answer, people's texts in the published schema."""

import json
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.judges import Checked
from eval.tasks import TASKS, draw_prompts, load_task, restaurants
from eval.tasks.__main__ import main as write_rows
from eval.tasks.restaurants import check, first_wrong, is_wrong, prompt_text, read_prompt, split_of
from eval.tasks.wordings import NAMES, NEAR, stated
from parse import Engine
from recipes.schema import Data, to_dict
from recipes.vocabulary import byte_level_tokenizer
from tests.conftest import random_model
from train import people as texts
from train.labels import Labeller
from train.people import best_of, main, people, rows_of
from train.rollouts import with_faults

MILL = {"name": "The Mill", "type": "coffee shop", "food": "Chinese", "price": "cheap", "rating": "5 out of 5"}
MILL |= {"area": "riverside", "near": "Café Rouge"}
COCUM = {"name": "Cocum", "type": "pub", "price": "£20-25", "family": "no"}
PROMPT = prompt_text([MILL, COCUM])
FIRST = "Near Café Rouge on the riverside is The Mill, a cheap coffee shop. Its Chinese food is rated 5 out of 5."
SECOND = "Cocum is a moderately priced pub, and no place for children."
RIGHT = f"1. {FIRST}\n2. {SECOND}"


@given(seed=st.integers(0, 10**6), split=st.sampled_from(list(restaurants.SPLITS)))
def test_a_prompt_is_read_as_it_was_drawn_and_its_sets_are_of_its_split(seed, split):
    prompt = restaurants.draw_prompt(random.Random(seed), split)
    places = read_prompt(prompt)
    assert prompt_text(places) == prompt
    assert len({place["name"] for place in places}) == len(places) in restaurants.PLACES
    assert {split_of(dict(reversed(place.items()))) for place in places} == {split}


def test_any_order_and_wording_is_right():
    assert check(PROMPT, RIGHT)
    assert first_wrong(PROMPT, RIGHT) is None
    other = "The Mill serves Chinese food. It is a highly rated, inexpensive café by the river, close to Cafe Rouge."
    assert check(PROMPT, f"1. {other}\n\n2. A pub in the £20-£25 price range, Cocum is not kid-friendly.")


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (RIGHT.replace("cheap", "pricey"), 0),
        (RIGHT.replace("5 out of 5", "1 out of 5"), 1),
        (RIGHT.replace("Chinese", "Indian"), 1),
        (RIGHT.replace("riverside", "city centre"), 0),
        (RIGHT.replace("Café Rouge", "Café Brazil"), 0),
        (RIGHT.replace("The Mill", "The Punter"), 0),
        (RIGHT.replace("no place", "a place"), 2),
        (RIGHT.replace("pub", "restaurant"), 2),
        (RIGHT.replace(" is rated 5 out of 5", ""), 1),  # left out, which the line break tells
        (RIGHT.replace("a cheap coffee shop", "a cheap coffee shop for families"), 0),  # nobody said so
        (f"{RIGHT}\n3. {SECOND}", 3),
        (f"2. {FIRST}", 0),
        (FIRST, 0),
    ],
)
def test_what_is_wrong_is_found_where_it_is(answer, sentence):
    assert not check(PROMPT, answer)
    assert first_wrong(PROMPT, answer) == sentence


def test_a_prefix_is_right_until_a_line_break_ends_its_paragraph():
    begun = f"1. {FIRST.partition('. ')[0]}."
    assert first_wrong(PROMPT, begun) is None
    assert first_wrong(PROMPT, f"{begun}\n") == 0
    assert first_wrong(PROMPT, "") is None
    assert not check(PROMPT, f"1. {FIRST}")


def test_to_say_it_again_is_no_fault_and_neither_is_what_is_no_attribute():
    again = RIGHT.replace("Its Chinese food", "With a lovely view of the river, its Chinese food")
    assert check(PROMPT, again)


@pytest.mark.parametrize(
    ("attribute", "value", "wordings"),
    [
        ("type", "coffee shop", ["a coffee shop", "a cosy café", "a coffee house"]),
        ("type", "pub", ["a pub", "some pubs", "a bar"]),
        ("type", "restaurant", ["a restaurant", "a restaraunt"]),
        ("food", "Fast food", ["sells fast food", "a fast-food place"]),
        ("food", "Japanese", ["Japanese dishes", "great sushi"]),
        ("food", "Italian", ["Italian food", "serves pasta"]),
        ("food", "English", ["British fare", "an English breakfast"]),
        ("area", "riverside", ["by the river", "in the riverside area", "on the riverfront"]),
        ("area", "city centre", ["in the city center", "centrally located", "in the heart of the city", "in the city"]),
        ("price", "low", ["cheap", "low-priced", "for less than £20", "under £20", "prices are low", "inexpensive"]),
        ("price", "middle", ["moderately priced", "£20-25", "mid-priced", "20 to 25 pounds", "average prices"]),
        ("price", "high", ["expensive", "high prices", "more than £30", "over 30 pounds", "the price range is high"]),
        ("rating", "low", ["1 out of 5", "one star", "a low customer rating", "poorly rated", "not highly rated"]),
        ("rating", "middle", ["3 out of 5", "an average rating", "customers rate it average", "three stars"]),
        (
            "rating",
            "high",
            ["5 out of 5 stars", "highly rated", "excellent reviews", "a five star place", "well-liked"],
        ),
        ("family", "yes", ["family-friendly", "kids are welcome", "bring the children", "suitable for families"]),
        (
            "family",
            "no",
            "not family-friendly, no kids, adults only, doesn't welcome children, non-child friendly, child-free, "
            "a place where I wouldn't bring the family".split(", "),
        ),
        ("near", "Express by Holiday Inn", ["near Express by Holiday Inn", "by the Holiday Inn"]),
        ("near", "Raja Indian Cuisine", ["near the Raja Indian Cuisine", "next to Raja"]),
        ("name", "The Wrestlers", ["The Wrestlers", "called Wrestlers"]),
    ],
)
def test_wordings_of_each_value(attribute, value, wordings):
    """And nothing else is stated of any attribute."""
    for wording in wordings:
        said = {name: found for name, found in stated(f"It is {wording}.").items() if found}
        assert said == {attribute: {value}}, wording


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A highly priced place with a low rating.", {"price": {"high"}, "rating": {"low"}}),
        ("Moderately priced and low rated.", {"price": {"middle"}, "rating": {"low"}}),
        ("Moderately priced and highly rated.", {"price": {"middle"}, "rating": {"high"}}),
        ("A moderately priced highly rated place.", {"price": {"middle"}, "rating": {"high"}}),
        ("A high-end place.", {"price": {"high"}}),
        ("It has a low food price range, and the rating is 'average'.", {"price": {"low"}, "rating": {"middle"}}),
        ("It has 1 out of 5 stars.", {"rating": {"low"}}),
        ("Near Café Sicilia, not far from Raja Indian Cuisine.", {"near": {"Café Sicilia", "Raja Indian Cuisine"}}),
        ("Although cheap, it is not for kids but highly rated.",
         {"price": {"low"}, "family": {"no"}, "rating": {"high"}}),
        ("The average customer review is fine.", {"rating": {"middle"}}),
        ("A friendly place.", {}),
    ],
)  # fmt: skip
def test_words_that_several_attributes_share(text, expected):
    assert {name: found for name, found in stated(text).items() if found} == expected


@pytest.mark.parametrize("name", [*NAMES, *NEAR])
def test_every_name_is_read(name):
    said = stated(f"Here is {name}.")
    assert (said["name"], said["near"]) == (({name}, set()) if name in NAMES else (set(), {name}))


@pytest.mark.parametrize("seed", range(30))
def test_a_right_answer_is_spoilt_in_one_place(seed):
    spoilt = restaurants.corrupted(PROMPT, RIGHT, random.Random(seed))
    assert not check(PROMPT, spoilt)
    assert spoilt == restaurants.corrupted(PROMPT, RIGHT, random.Random(seed))
    words, before = spoilt.split(), RIGHT.split()
    same = sum(a == b for a, b in zip(words, before, strict=False))
    same += sum(a == b for a, b in zip(reversed(words), reversed(before), strict=False))
    assert same >= len(before) - 14  # but for a value, or a sentence


def test_a_draft_with_a_fault_is_labelled_where_it_is(tokenizer):
    engine = Engine(random_model("llama", len(tokenizer)), tokenizer)
    labeller = Labeller(engine, Checked(TASKS["restaurants"]), 200, restaurants.first_wrong)
    labeller.engine.tokenizer = byte_level_tokenizer([RIGHT], 300)
    ids = labeller.engine.tokenizer.encode(RIGHT, add_special_tokens=False)
    row = {"prefix_ids": [], "draft_ids": ids, "ended": True, "valid": [True] * 4, "round": 0}
    rows = with_faults(labeller, PROMPT, row, 5)
    assert len({tuple(fault["draft_ids"]) for fault in rows}) > 1
    for fault in rows:
        text = labeller.engine.tokenizer.decode(fault["draft_ids"])
        assert not check(PROMPT, text)
        assert not fault["valid"][-1]
        assert len(fault["valid"]) == len(fault["ends"])
        assert fault["valid"] == sorted(fault["valid"], reverse=True)
    assert with_faults(labeller, PROMPT, {**row, "valid": [True, False]}, 5) == []
    labeller.judge = Checked(TASKS["ledger"])  # a task that makes none
    assert with_faults(labeller, PROMPT, row, 5) == []


# rows written for this test, in the schema of the published data
ROWS = [
    (
        "name[The Mill], eatType[pub], food[English], area[riverside]",
        "The Mill is a pub by the river with English food.",
    ),
    ("name[Cocum], eatType[coffee shop], priceRange[cheap], familyFriendly[no]", "No kids at Cocum, a cheap café."),
    ("name[Zizzi], eatType[pub], customer rating[low], near[Ranch]", "Zizzi is a poorly rated pub near Ranch."),
    (
        "name[Aromi], eatType[pub], area[city centre], familyFriendly[yes]",
        "Aromi is a family pub in the centre of the city.",
    ),
    ("name[Strada], eatType[restaurant], food[French], area[riverside]", "Strada is a French restaurant by the river."),
    ("name[Giraffe], eatType[pub], food[Indian], area[riverside]", "Giraffe is an Indian pub."),  # the area is missing
    ("name[Clowns], eatType[pub], food[Indian], area[riverside]", "clowns: indian pub, river"),  # no sentence
    ("name[The Golden Curry], food[Indian]", "The Golden Curry is Indian."),  # no place of the task
]


@pytest.fixture
def folder(tmp_path):
    lines = ["mr,ref", *(f'"{given}","{text}"' for given, text in ROWS)]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    return tmp_path


def test_peoples_texts_become_right_answers_of_the_training_split(folder):
    rows = list(people(rows_of(folder), 60, seed=0))
    for prompt, answer in rows:
        assert check(prompt, answer)
        assert {split_of(place) for place in read_prompt(prompt)} == {"train"}
        assert "Giraffe is an Indian pub." not in answer
        assert "clowns:" not in answer
    assert list(people(rows_of(folder), 10, seed=0)) == rows[:10]
    places = [place for prompt, _ in rows for place in read_prompt(prompt)]
    assert len({place["name"] for place in places}) > 15  # exchanged, in text and set alike
    assert {"English", "French", "Italian"} <= {place.get("food") for place in places}
    hub = [{"meaning_representation": given, "human_reference": text} for given, text in ROWS]
    assert list(people(hub, 10, seed=0)) == rows[:10]


def test_right_paragraphs_of_answers_are_mixed_anew_with_other_values(folder, tmp_path, capsys):
    rows = list(people(rows_of(folder), 20, seed=0))
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file, some in zip(files, (rows[:10], rows[10:]), strict=True):
        lines = (json.dumps({"prompt": prompt, "reference": answer}) for prompt, answer in some)
        file.write_text("\n".join(lines), encoding="utf-8")
    with files[0].open("a", encoding="utf-8") as file:
        wrong = {"prompt": rows[0][0], "reference": "1. Nowhere is a nightclub with Martian food."}
        file.write("\n" + json.dumps(wrong))
    out = tmp_path / "mixed.jsonl"
    assert main([str(out), "--mix", *map(str, files), "--rows", "40"]) == 0
    mixed = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(mixed) == 40
    assert all(check(row["prompt"], row["reference"]) and "Martian" not in row["reference"] for row in mixed)
    assert {split_of(place) for row in mixed for place in read_prompt(row["prompt"])} == {"train"}
    assert len({row["prompt"] for row in mixed} - {prompt for prompt, _ in rows}) == 40
    files[0].write_text('{"text": "x"}')
    assert main([str(out), "--mix", str(files[0])]) == 2
    assert "--mix takes JSONL files of rows with `prompt` and `reference`" in capsys.readouterr().err
    files[0].write_text(json.dumps(wrong))
    assert main([str(out), "--mix", str(files[0])]) == 2
    assert "none of the rows holds a paragraph that is right" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "old", "new", "expected"),
    [
        ("It is a pub.", "pub", "coffee shop", "It is a coffee shop."),
        ("An Indian pub, and a pub near it.", "Indian", "French", "A French pub, and a pub near it."),
        ("There is a French publican.", "French", "Italian", "There is an Italian publican."),
        ("A publican has a pub.", "pub", "restaurant", "A publican has a restaurant."),
        ("Its rating: a 1 out of 5.", "1 out of 5", "5 out of 5", "Its rating: a 5 out of 5."),
    ],
)
def test_values_are_exchanged_with_their_articles(text, old, new, expected):
    assert texts._exchanged(text, old, new) == expected


def test_a_set_lists_its_attributes_as_its_text_states_them():
    place = {"name": "Cocum", "type": "pub", "food": "Indian", "price": "cheap", "near": "Ranch"}
    text = "Near Ranch you pay little at Cocum, a cheap pub. Its food is Indian."
    assert list(texts._in_order(place, text)) == ["name", "near", "price", "type", "food"]
    assert restaurants.prompt_text([texts._in_order(place, text)]).endswith(
        "1. Cocum; near Ranch; price: cheap; pub; food: Indian"
    )


@pytest.mark.parametrize("seed", range(20))
def test_what_is_exchanged_in_a_text_is_exchanged_in_its_set(seed):
    place = {"name": "Cocum", "type": "pub", "food": "Indian", "price": "less than £20", "rating": "low"}
    text = "Cocum is an Indian pub where you pay less than £20. It has a low customer rating."
    other, varied = texts._varied(place, text, random.Random(seed))
    assert not is_wrong(other, varied)
    assert other["price"] in ("less than £20", "£20-25", "more than £30")
    assert other["rating"] in ("low", "average", "high")
    assert "a Indian" not in varied


def test_rows_of_other_data_are_refused(folder, tmp_path, capsys):
    with pytest.raises(ValueError, match="the rows lack the column 'meaning_representation': they hold text"):
        list(people([{"text": "x"}], 1, 0))
    out = tmp_path / "out/rows.jsonl"
    assert main([str(out), "--data", str(folder), "--rows", "5"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(set(row), row["split"]) for row in rows] == [({"prompt", "reference", "split"}, "answers")] * 5
    (tmp_path / "empty").mkdir()
    assert main([str(out), "--data", str(tmp_path / "empty")]) == 2
    assert "none of the rows holds a description that is right" in capsys.readouterr().err


def test_attributes_are_listed_as_people_state_them():
    """Where a place lies comes first or after its type, what else is before it stands beside it; nothing is lost."""
    rng = random.Random(3)
    places = [place for _ in range(300) for place in restaurants.read_prompt(restaurants.draw_prompt(rng, "train"))]
    orders = [list(place)[1:] for place in places]  # without the name
    before = [order[: order.index("type")] for order in orders]
    assert all(
        len(order) == len(set(order)) and restaurants.LEAST <= len(order) <= restaurants.MOST for order in orders
    )
    for attribute, share in restaurants.BEFORE.items():
        listed = [attribute in some for some, order in zip(before, orders, strict=True) if attribute in order]
        assert sum(listed) / len(listed) == pytest.approx(share, abs=0.08)
    located = [[each in ("area", "near") for each in some] for some in before]
    assert all(some == sorted(some, reverse=True) for some in located)
    assert len({tuple(order) for order in orders}) > 200


def test_a_tasks_prompts_as_rows_of_a_file(tmp_path, capsys):
    """Each with its split, none twice; and they are read as one's own prompts are."""
    file = tmp_path / "new" / "rows.jsonl"
    assert write_rows(["restaurants", str(file), "--rows", "30"]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert capsys.readouterr().out == f"30 prompts in {file}\n"
    assert Counter(row["split"] for row in rows) == {"answers": 12, "train": 9, "calibration": 6, "test": 3}
    assert len({row["prompt"] for row in rows}) == 30
    task = load_task(str(file), to_dict(Data(check="eval.tasks.restaurants:check")))
    assert len(draw_prompts(task, "test", 9, seed=0)) == 3
    with pytest.raises(SystemExit):
        write_rows(["restaurants", str(file), "--rows", "3"])
    assert "--rows is 3: give 10 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answers", "chosen"),
    [
        ([RIGHT], RIGHT),
        ([f"1. {FIRST}\n2. Cocum is a pub.", RIGHT.replace("Chinese", "Indian")], RIGHT),  # a right one of each
        ([f"1. {FIRST}", f"1. {SECOND}\n2. {SECOND}"], RIGHT),
        ([f"1. {FIRST}\n2. {SECOND} It it"], None),  # right, and not well put
        ([f"1. {FIRST}", f"1. {FIRST}\n3. {SECOND}"], None),
        ([""], None),
    ],
)
def test_the_best_of_several_answers_has_the_right_paragraphs_of_each(answers, chosen):
    assert best_of(PROMPT, answers) == chosen


def test_a_target_that_knows_nothing_answers_no_prompt(tmp_path):
    out = tmp_path / "own.jsonl"
    assert main([str(out), "--target", "recipes/models/ledger-draft", "--rows", "3"]) == 0
    assert out.read_text() == ""
