"""python -m parse: an answer and its history in a terminal."""

import pytest

from parse import Generation, Segment, Stats
from parse.__main__ import main, transcript

RESULT = Generation(
    "a c",
    [1, 2],
    "stop",
    [
        Segment("a", "draft", 0.91, True),
        Segment(" b", "draft", 0.2, False),
        Segment(" c", "target", None, True),
    ],
    Stats(draft_tokens=2, accepted_tokens=1, target_tokens=1, rounds=1),
)


def test_the_transcript_without_colour():
    lines = transcript(RESULT, colour=False).splitlines()
    assert lines[0].split() == ["0.91", "draft", "a"]
    assert lines[1].split() == ["0.20", "draft", "[-b-]"]
    assert lines[2].split() == ["target", "{+c+}"]
    assert "1 of 2 draft tokens accepted" in lines[-1]


def test_the_transcript_in_colour():
    text = transcript(RESULT, colour=True)
    assert "\033[32ma\033[0m" in text
    assert "\033[9;31mb\033[0m" in text
    assert "\033[34mc\033[0m" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["q", "--run", "nowhere"], "no recipe.yaml there"),
        (["q"], "give --run FOLDER"),
    ],
)
def test_what_is_missing_is_named(capsys, words, message):
    assert main(words) == 2
    assert message in capsys.readouterr().err
