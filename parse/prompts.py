"""Prompts: from text or chat messages to the tokens in front of an answer.

The control tokens of a prompt are those of the chat template alone: what looks like one in a user's words is encoded
as text. A last message of the assistant is the beginning of the answer, which the model continues. A template that
refuses messages, or never ends, is an error that says so. A model's thinking is handled here as well: whether the
template opens it, how it is left out, and what of an answer comes after it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

from jinja2 import Environment, TemplateSyntaxError, nodes
from transformers import PreTrainedTokenizerBase

from parse.local.loading import Messages
from parse.text import control_pattern, encode_continuation, encode_text
from parse.threads import in_thread

OPEN, CLOSE = "<think>", "</think>"  # around a model's thinking: Qwen's, DeepSeek's, and most others'
PRIVATE = range(0xE000, 0xF8FF)  # code points that stand for nothing: they mark places in a text
SECONDS = 10.0  # that a chat template may take for one prompt


def checked_prompt(prompt: Any) -> str | Messages:
    """A prompt as text or as messages whose contents are text; content given as parts of text is joined.

    Raises:
        ValueError: for anything else, such as images or null; the message says what was given.
    """
    if isinstance(prompt, str):
        return checked_text(prompt, "the prompt")
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes) or not prompt:
        raise ValueError(f"a prompt must be text or a list of messages, and is {shown(prompt)}")
    return [checked_turn(turn, f"message {number} of the prompt") for number, turn in enumerate(prompt, 1)]


def checked_turn(turn: Any, where: str) -> dict[str, str]:
    """The role and the content of a message, as text; else ValueError.

    Args:
        where: what the error calls the message.
    """
    if not isinstance(turn, Mapping):
        raise ValueError(f"{where} is {shown(turn)}: messages are objects with `role` and `content`")
    content = turn.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        for part in content:
            if not isinstance(part, Mapping) or part.get("type", "text") != "text":
                kind = part.get("type") if isinstance(part, Mapping) else part
                raise ValueError(
                    f"{where}: a part of `content` is {shown(kind)}; only parts of type 'text' can be read"
                )
        content = "".join(checked_text(part.get("text"), f"{where}: a part of `content`") for part in content)
    role = checked_text(turn.get("role"), f"{where}: `role`")
    return {"role": role, "content": checked_text(content, f"{where}: `content`")}


def checked_text(value: Any, name: str) -> str:
    """A text that can be written as UTF-8; else ValueError, which calls it by this name."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, and is {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half a character (a lone surrogate such as \\ud800): write it whole") from error
    return value


def shown(value: Any) -> str:
    """A value in a message: its type and its first characters."""
    text = ascii(value)
    return "null" if value is None else f"{type(value).__name__} {text if len(text) < 60 else text[:60] + '...'}"


def encode_prompt(
    prompt: str | Messages, tokenizer: PreTrainedTokenizerBase, raw: bool = False, opening: str | None = None
) -> list[int]:
    """The tokens of a prompt, after which the model writes; text is a user's turn of the chat template.

    Args:
        raw: `prompt` is the whole text that the model reads: no template, and control tokens in it are control tokens.
        opening: how the prompt begins the model's thinking; None as the template does. Of no account for a prompt that
            begins the answer: that one is given without thinking, or begins with it.

    Raises:
        ValueError: for a prompt that is none, see `checked_prompt`, or that the chat template refuses.
    """
    ids = _encoded(checked_prompt(prompt), tokenizer, raw, opening)
    if not ids:
        raise ValueError("the prompt is empty, and this tokenizer begins no text by itself: give some words")
    return ids


def _encoded(prompt: str | Messages, tokenizer: PreTrainedTokenizerBase, raw: bool, opening: str | None) -> list[int]:
    if raw:
        if not isinstance(prompt, str):
            raise ValueError("raw=True takes a prompt as text, and messages need the chat template")
        return list(tokenizer.encode(prompt))
    if isinstance(prompt, str) and not tokenizer.chat_template:
        if not control_pattern(tokenizer).search(prompt):
            return list(tokenizer.encode(prompt))
        return [*tokenizer.encode(""), *encode_continuation(prompt, tokenizer)]
    messages = as_messages(prompt)
    if unfit := next((turn["role"] for turn in messages if control_pattern(tokenizer).search(turn["role"])), None):
        raise ValueError(f"the role {unfit!r} holds a control token: use a role that the chat template knows")
    contents = "".join(turn["content"] for turn in messages)
    mark = next(chr(code) for code in PRIVATE if chr(code) not in contents)
    taken_apart = lambda found: mark + found[0].encode().hex() + mark
    marked = [
        # an assistant's turn may hold its thinking, which the template looks for
        {**turn, "content": control_pattern(tokenizer, turn["role"] != "assistant").sub(taken_apart, turn["content"])}
        for turn in messages
    ]
    asked, beginning = split_beginning(marked)
    text = render(asked, tokenizer)
    if begins_thinking(beginning):
        opening = ""
    elif beginning:
        opening = _opening(tokenizer) + no_thinking(tokenizer)
    if opening is not None:
        text = text.removesuffix(_opening(tokenizer)) + opening
    text += _as_the_template_trims(beginning, tokenizer)
    first, *rest = re.split(f"{mark}([0-9a-fA-F]+){mark}", text)
    if any(mark in template for template in (first, *rest[1::2])):
        raise ValueError(f"the chat template of {tokenizer.name_or_path} changes the words of a prompt: use another")
    ids = encode_text(first, tokenizer)
    for look_alike, template in zip(rest[::2], rest[1::2], strict=True):
        words = bytes.fromhex(look_alike).decode()
        ids += encode_continuation(words[0], tokenizer) + encode_continuation(words[1:], tokenizer)
        ids += encode_continuation(template, tokenizer, control=True)
    return ids


def as_messages(prompt: str | Messages) -> Messages:
    """A prompt as messages: text is a user's turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def split_beginning(prompt: str | Messages) -> tuple[Messages, str]:
    """The messages that are to be answered, and the beginning of the answer: a last message of the assistant, or empty.

    The beginning is what others call a prefill or `gen_prefix`: `transformers` and vLLM take a last message of the
    assistant in the same way if they are told `continue_final_message`.

    Raises:
        ValueError: where nothing is to be answered.
    """
    messages = as_messages(prompt)
    if messages[-1]["role"] != "assistant":
        return messages, ""
    if len(messages) == 1:
        raise ValueError("the prompt is a turn of the assistant alone: give a turn in front of it that is answered")
    return messages[:-1], messages[-1]["content"]


def _as_the_template_trims(beginning: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The beginning of an answer without the spaces around it that the template strips from an assistant's turn."""
    if not beginning:
        return ""
    front, back = _trims(tokenizer, str(tokenizer.chat_template))
    beginning = beginning.lstrip() if front else beginning
    return beginning.rstrip() if back else beginning


@lru_cache(maxsize=64)
def _trims(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[bool, bool]:
    """Whether a template strips spaces from the front and from the back of an assistant's turn."""
    answer, space = "ANSWER", "\n \n"
    turns = [("user", "?"), ("assistant", space + answer + space)]
    text = render([{"role": role, "content": content} for role, content in turns], tokenizer)
    before, _, after = text.partition(answer)
    return not before.endswith(space), not after.startswith(space)


def render(messages: Messages, tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    """The chat template's text for messages, up to where the assistant's answer begins.

    Raises:
        ValueError: where the template refuses them, or takes longer than `SECONDS`.
    """
    _check_template(str(tokenizer.chat_template))
    shape = {"tokenize": False, "add_generation_prompt": True, **options}
    name = tokenizer.name_or_path or "this tokenizer"
    try:
        return cast(str, in_thread(lambda: tokenizer.apply_chat_template(messages, **shape), SECONDS))
    except TimeoutError as error:
        raise ValueError(f"the chat template of {name} does not end within {SECONDS:.0f} s: use another") from error
    except Exception as error:  # whatever the template's own code raises
        roles = ", ".join(turn["role"] for turn in messages)
        raise ValueError(
            f"the chat template of {name} refuses the turns {roles}: {type(error).__name__}: {error}; use the roles "
            "and the order that it knows"
        ) from error


@lru_cache(maxsize=64)
def _check_template(template: str) -> None:
    """Refuse powers in a template: a large one is a single step, which nothing can stop."""
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except TemplateSyntaxError:  # `transformers` has tags of its own, and says more of what is wrong
        return
    if tree.find(nodes.Pow):
        raise ValueError("the chat template computes powers (**), which may take for ever: use another")


def encode_for_draft(
    prompt: str | Messages, draft: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase
) -> list[int]:
    """A draft's own tokens of a prompt, up to where the target's answer begins: inside thinking, or in front of it."""
    return encode_prompt(prompt, draft, opening=_opening(target))


def turn_after_answer(question: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template's text between the end of an answer and the reply to a question about it, without thinking.

    Raises:
        ValueError: where the template does not keep the assistant's turn as it was.
    """
    answer = "DRAFT-ENDS-HERE"
    turns = [("user", "prompt"), ("assistant", answer), ("user", question)]
    before, found, after = render([{"role": role, "content": content} for role, content in turns], tokenizer).partition(
        answer
    )
    if not (before and found):
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path} leaves out an assistant's turn, after which a question is "
            "asked: use a verifier that needs no question, or another template"
        )
    return after + no_thinking(tokenizer)


def unsuited(prompt: str | Messages, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why a model is asked for what it cannot know, in words; None where nothing is known against the prompt.

    A tokenizer may say what prompts its model was made for: `made_for` in its configuration, a regular expression that
    they match as a whole (`pattern`) and the same in words (`words`).

    Args:
        ids: the prompt's tokens.
    """
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown not in special and unknown in ids:
        return f"the tokenizer of {tokenizer.name_or_path} does not know all words of the prompt {prompt!r:.200}"
    made_for = tokenizer.init_kwargs.get("made_for") or {}
    asked = split_beginning(checked_prompt(prompt))[0][-1]["content"]
    if made_for and not re.fullmatch(made_for["pattern"], asked):
        own = f"{tokenizer.name_or_path} was made for {made_for['words']}"
        return f"{own}, not for {asked!r:.200}: its answer may be wrong"
    return None


def end_of_answer(ends: Collection[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """The token with which answers end: of those that may, the chat template's own, else the tokenizer's.

    Args:
        ends: one or more.
    """
    with contextlib.suppress(ValueError):  # of a template that leaves out answers
        after = encode_text(turn_after_answer("?", tokenizer), tokenizer) if tokenizer.chat_template else []
        if after and after[0] in ends:
            return after[0]
    own = cast(Any, tokenizer).eos_token_id
    return int(own) if own in ends else min(ends)


def opens_thinking(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template begins the model's thinking itself, so that answers hold its end alone."""
    return bool(_opening(tokenizer))


def _opening(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text with which the chat template begins the model's thinking; empty where it does not."""
    return _thinking(tokenizer, str(tokenizer.chat_template or ""))[0]


def no_thinking(tokenizer: PreTrainedTokenizerBase) -> str:
    """What stands in front of an answer that is given without thinking: an empty thought, as the template spells it.

    Empty where the template knows no thinking.
    """
    return _thinking(tokenizer, str(tokenizer.chat_template or ""))[1]


@lru_cache(maxsize=64)
def _thinking(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, str]:
    """How a template begins the thinking, and what leaves it out; see `_opening` and `no_thinking`."""
    if not template:
        return "", ""
    asked = render(as_messages("?"), tokenizer)
    if _is_open(asked):
        return asked[asked.rfind(OPEN) :], f"\n{CLOSE}\n\n"
    without = render(as_messages("?"), tokenizer, enable_thinking=False)  # it may change other turns as well
    return "", without[without.rfind(OPEN) :] if without.rstrip().endswith(CLOSE) and OPEN in without else ""


def _is_open(text: str) -> bool:
    return text.rfind(OPEN) > text.rfind(CLOSE)


def final_answer(text: str, opened: bool = False, prompt: str | Messages = "") -> str:
    """What of an answer comes after its thinking; nothing where that does not end.

    Args:
        opened: the chat template begins the thinking, see `opens_thinking`.
        prompt: what was answered: where it begins the answer, that decides what is open.
    """
    if beginning := split_beginning(prompt)[1]:
        opened = begins_thinking(beginning) and _is_open(beginning)
    while opened or begins_thinking(text):
        _, closed, rest = text.partition(CLOSE)
        if not closed:
            return ""
        text, opened = rest.lstrip(), False
    return text


def begins_thinking(text: str) -> bool:
    """Whether an answer itself begins with a thought; one that tells of the tag does not."""
    return text.lstrip().startswith(OPEN)
