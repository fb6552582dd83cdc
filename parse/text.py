"""Between text and tokens: words that continue a text, control tokens, characters that are not whole yet, and ends."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

THINKING = {"<think>", "</think>"}  # around a model's thoughts: Qwen's, DeepSeek's, and most others'


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a text, with nothing added."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def encode_continuation(text: str, tokenizer: PreTrainedTokenizerBase, control: bool = False) -> list[int]:
    """The tokens that continue another text with these words.

    Args:
        control: whether what looks like a control token is one; else it is text.
    """
    if control:
        return _continued(text, tokenizer)
    ids: list[int] = []
    while found := control_pattern(tokenizer).search(text):
        # without its first character it is no control token, and what stands alone is none either
        ids += _continued(text[: found.start()], tokenizer) + _continued(found[0][0], tokenizer)
        text = text[found.start() + 1 :]
    return ids + _continued(text, tokenizer)


def _continued(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a text after another one.

    Tokenizers of SentencePiece's kind put a space before a text, which must not come between two pieces: so the words
    are encoded after a line break, which is then left out.
    """
    if not text:
        return []
    line, both = encode_text("\n", tokenizer), encode_text("\n" + text, tokenizer)
    return both[len(line) :] if both[: len(line)] == line else encode_text(text, tokenizer)


def control_pattern(tokenizer: PreTrainedTokenizerBase, of_template: bool = False) -> re.Pattern[str]:
    """Finds what looks like one of the tokenizer's control tokens.

    Args:
        of_template: those too that the tokenizer does not call special and the chat template writes, such as `<think>`.
    """
    template = tokenizer.chat_template if of_template else ""
    return _control_pattern(tokenizer, len(tokenizer), str(template or ""))


@lru_cache(maxsize=64)
def _control_pattern(tokenizer: PreTrainedTokenizerBase, size: int, template: str) -> re.Pattern[str]:
    added: Any = tokenizer.added_tokens_decoder  # reading it takes milliseconds where there are many
    words = {str(token) for token in added.values() if token.special or (str(token).strip() and str(token) in template)}
    if not template:
        words -= THINKING  # which a model's own words may hold
    longest_first = sorted((word for word in words if len(word) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def text_of(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of tokens, exactly: special tokens and spaces as they are."""
    if backend := getattr(tokenizer, "backend_tokenizer", None):  # the same, without a look at the type of each token
        return cast(str, backend.decode(list(ids), skip_special_tokens=False))
    return cast(str, tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def certain_text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """`text_of`, but for a character at its end of which bytes may be missing yet: it comes with the later tokens."""
    return text_of(ids, tokenizer).rstrip("\N{REPLACEMENT CHARACTER}")


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where in a text the first of some stop strings begins; None where it holds none of them."""
    return min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)


def before_stop(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of some stop strings."""
    return text[: find_stop(text, stops)]


def through_stop(ids: Sequence[int], stops: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> int | None:
    """How many of some tokens there are up to the one that completes a stop string; None where they hold none."""

    def holds(count: int) -> bool:
        return find_stop(certain_text(ids[:count], tokenizer), stops) is not None

    if not stops or not holds(len(ids)):
        return None
    return bisect_left(range(len(ids)), True, key=holds)


def says(
    stops: Sequence[str], before: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> Callable[[list[int]], bool]:
    """Whether what is written after the tokens `before` holds one of some stop strings; asked after every token."""
    window = 2 * max(len(each.encode()) for each in stops) + 8  # tokens that hold the longest of them for certain

    def said(written: list[int]) -> bool:
        last = written[-window:]
        if len(last) < window:
            last = [*before[len(last) - window :], *last]
        return find_stop(text_of(last, tokenizer), stops) is not None

    return said


def undecided(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text may turn out to be the beginning of a stop string."""
    lengths = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(lengths, default=0)


def text_after(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that tokens add to another text: some tokenizers drop the space in front of a text that stands alone."""
    line = encode_text("\n", tokenizer)
    return text_of([*line, *ids], tokenizer)[len(text_of(line, tokenizer)) :]


def eos_ids(model: PreTrainedModel, fallback: int | None = None) -> frozenset[int]:
    """The tokens that end a sequence, from the generation config, then the config, then `fallback`."""
    size = int(cast(Any, model.get_input_embeddings()).weight.shape[0])
    return named_ends([model.generation_config, model.config], fallback, size)


def named_ends(sources: Iterable[Any], fallback: int | None, size: int) -> frozenset[int]:
    """The tokens that end a sequence, from the first of these configurations that names any, then `fallback`.

    Args:
        size: of the vocabulary: what lies beyond is no token.
    """
    for source in sources:
        value = getattr(source, "eos_token_id", None)
        ends = [] if value is None else list(value) if isinstance(value, Iterable) else [value]
        if ends := [int(end) for end in ends if 0 <= end < size]:
            return frozenset(ends)
    return frozenset() if fallback is None else frozenset([fallback])


def shared_ends(
    target_ends: Iterable[int], target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase
) -> frozenset[int]:
    """The target's end tokens as the draft's vocabulary has them: a draft that writes one has ended its answer."""
    vocabulary = draft.get_vocab()
    words = target.convert_ids_to_tokens(sorted(target_ends))
    return frozenset(vocabulary[word] for word in words if word in vocabulary)
