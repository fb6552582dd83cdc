"""Answers and verdicts from an OpenAI-compatible server, such as vLLM's or SGLang's."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from threading import Lock
from typing import Any, cast

import openai

from eval.tasks.task import Prompt
from parse.prompts import split_beginning
from recipes.schema import RecipeError, Server

REFUSED_PROMPT = (400, 413, 422)  # as this prompt will be at every try
LIKELIEST = 20  # words, of which "yes" and "no" are looked for: as many as the protocol allows
CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}  # the answer that a prompt begins
UNSETTLED = (10, 0.1)  # questions that a judge may leave open: so many, or that share of all
REFUSED = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)  # as every request will be


@dataclass(frozen=True)
class Answered:
    """An answer of the target, or why there is none."""

    text: str
    ended: bool
    thinking: str | None = None  # where a server hands it over apart
    error: str | None = None  # the server will never answer this prompt
    failed: str | None = None  # this try came to nothing, see `eval.generation.FAILED`
    ids: list[int] | None = None  # the target's own tokens, where they are known


class Client:
    """Asks one server."""

    def __init__(self, server: Server, model: str, limit: int, key: str = "answers.server") -> None:
        """Set up.

        Args:
            model: its name on the server.
            limit: tokens of an answer.
            key: where the recipe names the server.
        """
        self.server, self.model, self.limit, self.key = server, model, limit, key
        self.questions = self.unsettled = 0
        self._lock, self._gives_logprobs, self._last = Lock(), True, ""
        self._client = openai.OpenAI(
            base_url=server.url,
            api_key=os.environ.get(server.key_variable, "none"),
            timeout=server.timeout,
            max_retries=server.retries,
        )

    def answer(self, prompt: Prompt) -> Answered:
        """The greedy answer to a prompt; where the request is refused for its own sake, one with an `error`.

        Raises:
            RecipeError: where the server cannot be reached, or refuses the model or the key.
        """
        try:
            choice = self._asked(prompt, self.limit)
            fields = choice.message.model_dump()
        except RecipeError:
            raise
        except openai.APITimeoutError:
            return Answered("", False, failed=f"took the server longer than {self.server.timeout:.0f} s")
        except openai.APIStatusError as error:
            if error.status_code in REFUSED_PROMPT:
                return Answered("", False, error=f"was refused by the server: {error}")
            return Answered("", False, failed=f"got the status {error.status_code} from the server: {error}")
        except (
            openai.APIError,
            AttributeError,
            IndexError,
            TypeError,
            ValueError,
        ) as error:  # whatever a broken server may send
            return Answered("", False, failed=f"got no answer that can be read: {type(error).__name__}: {error}")
        beginning = split_beginning(prompt)[1].strip()
        if beginning and (choice.message.content or "").lstrip().startswith(beginning):
            return Answered("", False, error="was begun anew by the server, which knows no continue_final_message")
        thinking = fields.get("reasoning_content") or fields.get("reasoning")
        return Answered(choice.message.content or "", choice.finish_reason == "stop", thinking)

    def probability_yes(self, question: str) -> float:
        """P(yes) against P(no) as the first word of the reply; 1 or 0 by that word from a server without probabilities.

        What the server does not settle, a question that is too long or a reply of another kind, is no yes. It is
        counted, and a server that settles little is an error.

        Raises:
            RecipeError: where the server cannot be reached, refuses the model or the key, or settles little.
        """
        settled = self._verdict(question)
        with self._lock:
            self.questions += 1
            self.unsettled += settled is None
            if self.unsettled > max(UNSETTLED[0], UNSETTLED[1] * self.questions):
                raise RecipeError(
                    f"{self.key}: {self.model!r} has answered {self.unsettled} of {self.questions} questions with "
                    f"neither yes nor no, the last one with {self._last!r:.200}: name a model that does as it is told, "
                    "or turn its thinking off (extra_body: {chat_template_kwargs: {enable_thinking: false}})"
                )
        return settled or 0.0

    def _verdict(self, question: str) -> float | None:
        """P(yes); None where the server does not settle it."""
        asking: dict[str, Any] = {"logprobs": True, "top_logprobs": LIKELIEST} if self._gives_logprobs else {}
        try:
            choice = self._asked([{"role": "user", "content": question}], 1, **asking)
            known = choice.logprobs.content[0].top_logprobs if choice.logprobs and choice.logprobs.content else []
            words = [(one.token, math.exp(one.logprob)) for one in known] or [(choice.message.content or "", 1.0)]
        except RecipeError:
            raise
        except openai.BadRequestError as error:
            self._last = str(error)
            if not asking:
                return None
            self._gives_logprobs = False  # perhaps it has none to give
            return self._verdict(question)
        except (openai.APIError, AttributeError, IndexError, TypeError, ValueError) as error:
            self._last = f"{type(error).__name__}: {error}"
            return None
        yes, no = (sum(p for word, p in words if word.strip().lower() == reply) for reply in ("yes", "no"))
        self._last = words[0][0]
        return yes / (yes + no) if yes + no else None

    def _asked(self, prompt: Prompt, limit: int, **more: Any) -> Any:
        """The first choice of a greedy completion.

        Raises:
            RecipeError: where the server cannot be reached, or refuses the model or the key.
            openai.APIError: for what may go better another time, or with another prompt.
        """
        asked, beginning = split_beginning(prompt)
        messages = [*asked, {"role": "assistant", "content": beginning}] if beginning else asked
        try:
            completion = self._client.chat.completions.create(
                model=self.model,
                messages=cast(Any, messages),
                max_tokens=limit,
                temperature=0.0,
                extra_body=(CONTINUE if beginning else {}) | self.server.extra_body,
                **more,
            )
        except openai.APITimeoutError:
            raise
        except openai.APIConnectionError as error:
            raise RecipeError(
                f"{self.key}: {self.server.url} cannot be reached after {self.server.retries + 1} tries "
                f"({error.__cause__ or error}): start the server or mend {self.key}.url; what is answered is kept"
            ) from error
        except REFUSED as error:
            raise RecipeError(
                f"{self.key}: {self.server.url} refuses the model {self.model!r} or the key in "
                f"${self.server.key_variable}: {error}"
            ) from error
        return completion.choices[0]
