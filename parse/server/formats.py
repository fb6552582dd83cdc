"""Bodies of answers: chats and completions, whole or in chunks, with what PARSE tells of each."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from parse.generation import Generation, Segment, Stats
from parse.server.protocol import Completion, Request
from parse.server.scores import Scores
from parse.text import text_of


class Format:
    """How one request is answered; the same identity stands in all of its chunks."""

    prefix: ClassVar[str]
    kind: ClassVar[str]  # of a whole body
    chunk_kind: ClassVar[str]

    def __init__(
        self, model: str, asked: Request, prompts: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Set up.

        Args:
            prompts: the tokens of each choice's prompt.
        """
        self.asked, self.prompts, self.tokenizer = asked, prompts, tokenizer
        self._begun: set[int] = set()  # choices of which a chunk was made
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, results: Sequence[Generation], scores: Sequence[Scores | None]) -> dict[str, Any]:
        """The body of a finished request."""
        choices = [
            {
                "index": i,
                **self.said(i, result, scores[i]),
                "finish_reason": result.finish_reason,
                "parse": told(result),
            }
            for i, result in enumerate(results)
        ]
        tokens = sum(len(result.token_ids) for result in results)
        return {
            **self._head,
            "object": self.kind,
            "choices": choices,
            "usage": self.usage(tokens),
            "metrics": speculative([result.stats for result in results]),
        }

    def chunk(self, index: int, text: str, tokens: int, segments: Sequence[Segment]) -> dict[str, Any]:
        """A chunk that adds text to a choice, and says where it is from once that is settled."""
        choice: dict[str, Any] = {"index": index, **self.added(index, text), "finish_reason": None}
        if segments:
            choice["parse"] = {"segments": [vars(segment) for segment in segments]}
        return self._chunk([choice], self.usage(tokens) if self.asked.every_usage else None)

    def last(self, index: int, result: Generation, tokens: int) -> dict[str, Any]:
        """The chunk that ends a choice."""
        choice = {"index": index, **self.added(index, ""), "finish_reason": result.finish_reason, "parse": told(result)}
        usage = self.usage(tokens) if self.asked.every_usage else None
        return self._chunk([choice], usage) | {"metrics": speculative([result.stats])}

    def used(self, tokens: int) -> dict[str, Any]:
        """The chunk after all others, without choices."""
        return self._chunk([], self.usage(tokens))

    def usage(self, tokens: int) -> dict[str, int]:
        """What a request took: the prompt of several choices counts once."""
        prompt = sum(len(ids) for ids in self.prompts[:: self.asked.n or 1])
        return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> dict[str, Any]:
        body: dict[str, Any] = {**self._head, "object": self.chunk_kind, "choices": choices}
        return body | {"usage": usage} if usage else body

    def said(self, index: int, result: Generation, scores: Scores | None) -> dict[str, Any]:
        """A choice's words."""
        raise NotImplementedError

    def added(self, index: int, text: str) -> dict[str, Any]:
        """A chunk's words."""
        raise NotImplementedError


class ChatFormat(Format):
    """Bodies of /v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def said(self, index: int, result: Generation, scores: Scores | None) -> dict[str, Any]:
        """The assistant's turn."""
        return {"message": {"role": "assistant", "content": result.text, "refusal": None}, "logprobs": None}

    def added(self, index: int, text: str) -> dict[str, Any]:
        """What is added to it."""
        role = {} if index in self._begun else {"role": "assistant"}  # once a choice
        self._begun.add(index)
        return {"delta": role | ({"content": text} if text or role else {}), "logprobs": None}


class CompletionFormat(Format):
    """Bodies of /v1/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"
    asked: Completion

    def said(self, index: int, result: Generation, scores: Scores | None) -> dict[str, Any]:
        """The text, after the prompt's where the request wants it repeated."""
        ids, given = self.prompts[index], self.asked.prompts[index // (self.asked.n or 1)]
        before = given if isinstance(given, str) else text_of(ids, self.tokenizer)
        logprobs = None if scores is None else self._logprobs(scores, 0 if self.asked.echo else len(ids))
        return {"text": (before if self.asked.echo else "") + result.text, "logprobs": logprobs}

    def added(self, index: int, text: str) -> dict[str, Any]:
        """More text."""
        return {"text": text, "logprobs": None}

    def _logprobs(self, scores: Scores, start: int) -> dict[str, Any]:
        """OpenAI's lists of a text's tokens from one on."""
        words, offsets, length = [self._word(token) for token in scores.ids[start:]], list[int](), 0
        for word in words:
            offsets.append(length)
            length += len(word)
        likeliest = [one and self._by_word(one) for one in scores.likeliest[start:]]
        return {
            "tokens": words,
            "token_logprobs": scores.logprobs[start:],
            "top_logprobs": likeliest,
            "text_offset": offsets,
        }

    def _by_word(self, logprobs: dict[int, float]) -> dict[str, float]:
        """Of tokens with the same text the likeliest."""
        best: dict[str, float] = {}
        for token, logprob in logprobs.items():
            word = self._word(token)
            best[word] = max(logprob, best.get(word, logprob))
        return best

    def _word(self, token: int) -> str:
        return text_of([token], self.tokenizer)


def told(result: Generation) -> dict[str, Any]:
    """What PARSE tells of an answer: its pieces and where they are from, tokens, rounds and seconds."""
    return {"segments": [vars(segment) for segment in result.segments], **vars(result.stats)}


def speculative(all_stats: Sequence[Stats]) -> dict[str, Any]:
    """The counts of drafts, in vLLM's names."""
    return {
        "speculative_decoding": {
            "num_drafts": sum(stats.verify_passes for stats in all_stats),
            "num_draft_tokens": sum(stats.draft_tokens for stats in all_stats),
            "num_accepted_tokens": sum(stats.accepted_tokens for stats in all_stats),
        }
    }
