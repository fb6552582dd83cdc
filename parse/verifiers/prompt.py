"""The paper's verifier: the target is asked in words whether a prefix is right."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from parse.prompts import turn_after_answer
from parse.text import encode_text
from parse.verifiers.base import Calibration, Evidence, Labels, Needs

QUESTION = "Is the answer above correct so far, as far as it goes? Reply with one word, yes or no."


@dataclass
class PromptVerifier:
    """The paper's verdict: P(yes) / (P(yes) + P(no)) after a chat turn that asks for it."""

    suffix_ids: list[int]
    yes_ids: list[int]
    no_ids: list[int]
    threshold: float = 0.5
    kind: str = "prompt"
    calibration: Calibration | None = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, threshold: float = 0.5) -> PromptVerifier:
        """Ask in the tokenizer's chat template; its `verdict_question`, if it has one, is the question.

        Raises:
            ValueError: if the tokenizer has no chat template, one without room for the question, or no single token for
                yes and no.
        """
        question = tokenizer.init_kwargs.get("verdict_question", QUESTION)
        if not tokenizer.chat_template:
            raise ValueError(
                'verifier="prompt" asks in a chat turn, and the target\'s tokenizer has no chat template: '
                'use "likelihood" or a trained verifier'
            )
        suffix = encode_text(turn_after_answer(question, tokenizer), tokenizer)
        yes, no = (_single_tokens(tokenizer, word) for word in ("yes", "no"))
        return cls(suffix, yes, no, threshold)

    @classmethod
    def if_possible(cls, tokenizer: PreTrainedTokenizerBase) -> PromptVerifier | None:
        """The same; None where the tokenizer does not allow it."""
        try:
            return cls.of(tokenizer)
        except ValueError:
            return None

    @property
    def needs(self) -> Needs:
        """The score of yes against no after the question."""
        return Needs(suffix_ids=tuple(self.suffix_ids), labels=self.labels)

    @property
    def labels(self) -> Labels:
        """What says yes, and what says no."""
        return tuple(self.yes_ids), tuple(self.no_ids)

    def confidences(self, evidence: Evidence) -> Tensor:
        """P(yes) against P(no) after each suffix copy: float32 [K]."""
        assert evidence.label_scores is not None
        return evidence.label_scores


def _single_tokens(tokenizer: PreTrainedTokenizerBase, word: str) -> list[int]:
    spellings = [word, word.capitalize(), f" {word}", f" {word.capitalize()}"]
    unknown = tokenizer.unk_token_id
    encoded = [encode_text(spelling, tokenizer) for spelling in spellings]
    found = sorted({ids[0] for ids in encoded if len(ids) == 1 and ids[0] != unknown})
    if not found:
        raise ValueError(f'verifier="prompt" needs "{word}" as one token, and the tokenizer has none')
    return found
