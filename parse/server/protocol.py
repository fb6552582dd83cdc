"""What a request may say, in OpenAI's words and PARSE's own, and how it is refused.

Every field is read, or refused by its name: nothing that a client asks for is left out in silence.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

NEUTRAL: dict[str, tuple[Any, ...]] = {  # fields whose other values would change answers, and are refused
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "length_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "tool_choice": ("none", "auto"),  # of no tools
    "use_beam_search": (False,),
}
ROUNDS = ("threshold", "policy", "handback", "horizon", "lookahead")  # settings of PARSE's rounds
Count = Annotated[int, Field(ge=1, strict=True)]
TokenIds = list[Annotated[int, Field(ge=0, strict=True)]]


class Refused(Exception):
    """A request that is not answered, in OpenAI's format."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """What the client gets."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Strict(BaseModel):
    """Unknown fields are refused, unless they hold nothing: clients send back what they were given, nulls and all."""

    model_config = ConfigDict(extra="forbid")
    nulls: ClassVar[tuple[str, ...]] = ()  # fields of which a null says something

    @model_validator(mode="before")
    @classmethod
    def without_nothing(cls, fields: Any) -> Any:
        """Leave out nulls, and of unknown fields what is empty."""
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if not cls._is_nothing(name, value)}

    @classmethod
    def _is_nothing(cls, name: str, value: Any) -> bool:
        if name in cls.model_fields:
            return value is None and name not in cls.nulls
        return value is None or value in ([], {}, "")


class StreamOptions(Strict):
    """What a stream tells beside the text."""

    include_usage: bool = False  # in a last chunk, without choices
    continuous_usage_stats: bool = False  # in every chunk


class Switches(Strict):
    """PARSE's own settings, see `Engine.generate`; what is left out is the server's."""

    nulls = ("threshold", "horizon")  # as calibrated; the whole answer

    method: Literal["parse", "target", "draft"] | None = None
    threshold: float | None = None
    policy: Literal["first_fail", "longest", "whole"] | None = None
    handback: Literal["segment", "never"] | None = None
    horizon: Literal["segment"] | Count | None = None
    lookahead: Annotated[int, Field(ge=0, strict=True)] | None = None


class Request(Strict):
    """What chats and completions share."""

    model: str
    max_tokens: Annotated[int, Field(ge=0, strict=True)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=-1, strict=True)] | None = None  # -1, as vLLM has it, keeps all
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool = False
    n: Count | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # who asks; it changes nothing
    parse: Switches = Field(default_factory=Switches)

    @model_validator(mode="before")
    @classmethod
    def without_neutral(cls, fields: Any) -> Any:
        """Take out fields that this server does not know, where their value asks for nothing.

        Raises:
            ValueError: naming the first one that asks for something.
        """
        if not isinstance(fields, dict):
            raise ValueError("the body must be a JSON object")
        others = NEUTRAL.keys() - cls.model_fields.keys()
        for name in sorted(others & fields.keys()):
            if fields[name] not in (None, *NEUTRAL[name]):
                raise Refused(400, f"{name!r} is not supported: leave it out", name, "unsupported_parameter")
        return {name: value for name, value in fields.items() if name not in others}

    @field_validator("stream_options")
    @classmethod
    def of_streams(cls, options: StreamOptions | None, info: Any) -> StreamOptions | None:
        """`stream_options` belongs to streams."""
        if options is not None and not info.data.get("stream"):
            raise ValueError("is only allowed with stream: true")
        return options

    @property
    def limit(self) -> int | None:
        """Tokens of an answer at most; None where the request does not say."""
        return self.max_tokens

    @property
    def as_calibrated(self) -> bool:
        """Whether no setting is asked for that the verifier was not calibrated with."""
        return not (self.parse.model_fields_set or self.temperature or self.stop or self.ignore_eos)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def every_usage(self) -> bool:
        """Whether every chunk of a stream says what was used so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    def settings(self, defaults: dict[str, Any], choice: int) -> dict[str, Any]:
        """Arguments of `Engine.settings`; of several choices each draws from a stream of its own.

        Args:
            defaults: the server's own.
        """
        chosen = dict(defaults)
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "max_new_tokens": self.limit}
        if self.top_k is not None:
            sampling["top_k"] = max(self.top_k, 0)
        chosen |= {name: value for name, value in sampling.items() if value is not None}
        seed = self.seed if self.seed is not None else chosen.get("seed")
        chosen["seed"] = None if seed is None else seed + choice
        asked = self.parse.model_dump(exclude_unset=True)
        if "method" in asked and asked["method"] in ("target", "draft"):  # alone: without rounds
            chosen = {name: value for name, value in chosen.items() if name not in ROUNDS}
        return chosen | asked | {"stop": self.stop, "ignore_eos": self.ignore_eos}


class Part(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """A turn of a chat."""

    role: str
    content: str | list[Part]

    def turn(self) -> dict[str, str]:
        """The turn as the engine takes it: its parts joined."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content}


class Chat(Request):
    """A body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=0, strict=True)] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    continue_final_message: bool | None = None  # vLLM's fields for a begun answer
    add_generation_prompt: bool | None = None

    @model_validator(mode="after")
    def begun_by_the_assistant(self) -> Chat:
        """What vLLM is told of the last message must be what is done with it here."""
        begun = self.messages[-1].role == "assistant"
        for name, fitting in (("continue_final_message", begun), ("add_generation_prompt", not begun)):
            if getattr(self, name) not in (None, fitting):
                raise ValueError(
                    f"{name} must be {str(fitting).lower()} where the last message is the {self.messages[-1].role}'s: "
                    "one of the assistant is the beginning of the answer, any other is answered"
                )
        return self

    @property
    def limit(self) -> int | None:
        """The newer name of the two counts."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class Completion(Request):
    """A body of /v1/completions."""

    prompt: str | TokenIds | list[str] | list[TokenIds]
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20, strict=True)] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or several, in their order.

        Raises:
            Refused: where there is none, or an empty one.
        """
        one = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
        prompts: Any = [self.prompt] if one else self.prompt
        if not prompts or not all(prompts):
            raise Refused(400, "a prompt is empty: give some words or tokens", "prompt")
        return prompts  # type: ignore[no-any-return]


class Tokenize(Strict):
    """A body of /tokenize: a text, or a chat up to where the answer begins."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def one_of_both(self) -> Tokenize:
        """Either a text or a chat."""
        if (self.prompt is None) == (not self.messages):
            raise ValueError("give either prompt or messages")
        return self


class Detokenize(Strict):
    """A body of /detokenize."""

    model: str | None = None
    tokens: TokenIds


def read(kind: type[BaseModel], body: bytes) -> Any:
    """A body as a request of a kind.

    Raises:
        Refused: naming the first field that is wrong.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if not _is_alternative(part))
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            raise Refused(400, f"{place!r} is not known to this server: leave it out", place) from error
        raise Refused(400, f"{place}: {message}" if place else message, place or None) from error


def _is_alternative(part: Any) -> bool:
    """Whether a part of an error's place names a type of a union, and no field."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "constrained-int", "Switches"))
