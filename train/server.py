"""Answers from an OpenAI-compatible server, such as vLLM's or SGLang's."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, cast

import openai

from eval.tasks.task import Prompt
from recipes.schema import RecipeError, Server

REFUSED_PROMPT = (400, 413, 422)  # as this prompt will be at every try
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

    def __init__(self, server: Server, model: str, limit: int) -> None:
        """Set up.

        Args:
            model: its name on the server.
            limit: tokens of an answer.
        """
        self.server, self.model, self.limit = server, model, limit
        key = os.environ.get(server.key_variable, "none")
        self._client = openai.OpenAI(
            base_url=server.url, api_key=key, timeout=server.timeout, max_retries=server.retries
        )

    def answer(self, prompt: Prompt) -> Answered:
        """The greedy answer to a prompt; where the request is refused for its own sake, one with an `error`.

        Raises:
            RecipeError: where the server cannot be reached, or refuses the model or the key.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            completion = self._client.chat.completions.create(
                model=self.model,
                messages=cast(Any, messages),
                max_tokens=self.limit,
                temperature=0.0,
                extra_body=self.server.extra_body,
            )
            choice = completion.choices[0]
            fields = choice.message.model_dump()
        except openai.APITimeoutError:
            return Answered("", False, failed=f"took the server longer than {self.server.timeout:.0f} s")
        except openai.APIConnectionError as error:
            raise RecipeError(
                f"answers.server: {self.server.url} cannot be reached after {self.server.retries + 1} tries "
                f"({error.__cause__ or error}): start the server or mend answers.server.url; what is answered is kept"
            ) from error
        except REFUSED as error:
            raise RecipeError(
                f"answers.server: {self.server.url} refuses the model {self.model!r} or the key in "
                f"${self.server.key_variable}: {error}"
            ) from error
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
        thinking = fields.get("reasoning_content") or fields.get("reasoning")
        return Answered(choice.message.content or "", choice.finish_reason == "stop", thinking)
