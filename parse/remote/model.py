"""A model on a vLLM server, as rounds know it; see `parse.model`.

The server keeps nothing for us between two requests but its prefix cache: every request sends all token ids, and what
it has read before costs it nothing. A draft is judged by one request: for the probability of two label
tokens after each of K prefixes, or for the likeliest tokens after each of its tokens, among them those of a folded
verifier; see `parse.verifiers.folded`.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from parse.model import OnToken, Proposer, Stop
from parse.remote.client import Client, Options, Stream
from parse.sampling import GREEDY, Sampling, Written
from parse.text import encode_text, named_ends
from parse.verifiers import Evidence, Labels, Needs

PROBE = "Größe: 12 km²\n\tdef f(x): return x ** 2  # “ok” 東京 🙂"  # by which tokenizers are told apart
PLAIN = {  # a setting that a request leaves out comes from the model's generation config
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
NO_ROUTE = (404, 405, 501)
FORBIDDEN = -100.0  # added to a logit
MOST_LABELS = 18  # of a folded verifier: a server tells the likeliest 20 tokens
MOST_FORBIDDEN = 256  # tokens in one request; of a vocabulary padded by more none is forbidden: nothing teaches them


@dataclass(frozen=True)
class RemoteModel:
    """A model that a vLLM server serves."""

    client: Client
    tokenizer: Any
    eos_ids: frozenset[int]
    vocabulary: int
    context_length: int
    provides: frozenset[str]
    forbidden: frozenset[int] = frozenset()  # tokens that it never writes: labels in its vocabulary
    verdict_tokens: int = 2  # the end that stands for what comes next, and the one that the server would write

    @property
    def name(self) -> str:
        """Its address."""
        return f"{self.client.url}#{self.client.model}"

    @classmethod
    def connect(cls, url: str, options: dict[str, Any] | None = None, tokenizer: Any = None) -> RemoteModel:
        """A model of a server, once it is seen that it can be used.

        Args:
            url: http://host:port/v1#MODEL; MODEL may be left out where one is served.
            options: see `Options`.
            tokenizer: the model's, where the server's own folder or hub id cannot be read here.

        Raises:
            ServerError: where the server is not to be reached, or refuses the key.
            ValueError: where it serves another model, has another tokenizer or no prefix cache.
        """
        chosen = Options.of(options)
        client = Client(url, chosen)
        served = _served(client)
        sources = [
            source for source in (served["root"], chosen.tokenizer, getattr(tokenizer, "name_or_path", "")) if source
        ]
        tokenizer = tokenizer or _tokenizer_of(sources[-1 if chosen.tokenizer else 0], client)
        _check_tokenizer(client, tokenizer)
        _check_cache(client)
        configurations = [one for kind in (GenerationConfig, AutoConfig) for one in _configurations(kind, sources)]
        texts = [one.get_text_config() for one in _configurations(AutoConfig, sources)]
        vocabulary = texts[0].vocab_size if texts else len(tokenizer)
        ends = named_ends(configurations, tokenizer.eos_token_id, vocabulary)
        folded = next((one.folded_labels for one in configurations if hasattr(one, "folded_labels")), None)
        labels = folded or _beyond(client, vocabulary)
        vocabulary = labels[0] if labels else vocabulary
        length = int(served["max_model_len"])
        return cls(client, tokenizer, ends, vocabulary, length, _provided(client, labels), frozenset(labels))

    def drafting(self, ends: frozenset[int], vocabulary: int | None) -> RemoteModel:
        """The same model as a draft.

        Args:
            ends: tokens that end its answers too.
            vocabulary: it writes no tokens from this one on; None: all of its own.
        """
        beyond = frozenset() if vocabulary is None else frozenset(range(vocabulary, self.vocabulary))
        forbidden = self.forbidden | (beyond if len(beyond) <= MOST_FORBIDDEN else frozenset())
        return replace(self, eos_ids=self.eos_ids | ends, forbidden=forbidden)

    def metrics(self) -> str:
        """The server's figures, as Prometheus reads them."""
        return self.client.ask(self.client.get("/metrics")).text

    def check_tokens(self, ids: Sequence[int]) -> None:
        """Refuse tokens that the model has no embedding for."""
        if not 0 <= min(ids, default=0) <= max(ids, default=0) < self.vocabulary:
            raise ValueError(f"a prompt holds the token {max(ids)}, and {self.name} has {self.vocabulary}")

    def warm_up(self, at_once: int = 1) -> None:
        """Nothing: the server does so when it starts."""

    def open(self, prompt_ids: Sequence[int], layers: tuple[int, ...] = ()) -> RemoteSequence:
        """A sequence that begins with a prompt; see `parse.model.Model`."""
        return RemoteSequence(self, prompt_ids)

    async def label_score(self, ids: Sequence[int], labels: Labels) -> float:
        """P(yes) / (P(yes) + P(no)) of the token after a text."""
        return (await self.label_scores([], [list(ids)], labels))[0]

    async def label_scores(self, query: list[int], items: list[list[int]], labels: Labels) -> list[float]:
        """P(yes) / (P(yes) + P(no)) of the token after `query` and each of K items.

        The server tells the probability of the first label among all: of several that say yes it is asked for each.

        Raises:
            ValueError: where a text is longer than the server reads: it would cut it in silence.
        """
        self._check_length(len(query) + max(map(len, items)))
        yes, no = labels
        scores = [0.0] * len(items)
        for label in yes:
            others = [one for one in yes if one != label]
            body = {"query": query, "items": items, "label_token_ids": [label, *others, *no], "apply_softmax": True}
            reply = await self.client.call(self.client.posted("/generative_scoring", body))
            for part in reply["data"]:
                scores[part["index"]] += part["score"]
        return scores

    async def log_probs(self, query: list[int], draft: Written) -> list[float]:
        """The log-probability of each of a draft's N tokens after `query`, nats; M of them, see `Evidence`."""
        self._check_length(len(query) + len(draft.ids))
        ends = sorted(self.eos_ids)
        body = {"prompt": [*query, *draft.ids], "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        body |= {"logprobs": len(ends), "logprob_token_ids": ends, "return_tokens_as_token_ids": True}
        reply = (await self.client.call(self.client.posted("/v1/completions", body)))["choices"][0]
        told = reply["prompt_logprobs"][len(query) :]
        found = [one[str(token)]["logprob"] for token, one in zip(draft.ids, told, strict=True)]
        if draft.ended:
            after = reply["logprobs"]["top_logprobs"][0]
            found.append(math.log(sum(math.exp(after[f"token_id:{token}"]) for token in ends)))
        return found

    async def rises(self, query: list[int], draft: Written, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The rises of R rows after each of a draft's N tokens, [N, R], and the margins of its tokens, [M]; float32.

        The server tells the R + 1 likeliest tokens in every place, and so each row that rises over all real ones, and
        the likeliest of those. The end stands after the draft, so that there is a place after its last token.
        """
        self._check_length(len(query) + len(draft.ids) + 1)
        ids = [*query, *draft.ids, min(self.eos_ids, default=0)]
        body = {"prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": len(rows) + 1}
        reply = (await self.client.call(self.client.posted("/v1/completions", body)))["choices"][0]
        rises, margins = list[list[float]](), list[float]()
        for place, told in enumerate(reply["prompt_logprobs"][len(query) :]):
            found = {int(token): float(one["logprob"]) for token, one in told.items()}
            top = max(value for token, value in found.items() if token not in rows)
            rises.append([max(found.get(row, top) - top, 0.0) for row in rows])
            wanted = draft.ids[place : place + 1] or self.eos_ids
            margins.append(top - max(found[token] for token in wanted if token in found))
        count = len(draft.ids) + draft.ended
        return torch.tensor(rises[1:]).view(-1, len(rows)), torch.tensor(margins[:count])

    def _check_length(self, tokens: int) -> None:
        if tokens >= self.context_length:
            raise ValueError(
                f"a text of {tokens} tokens is to be judged, and {self.name} reads {self.context_length - 1}: start "
                "the server with a larger --max-model-len, or lower max_new_tokens"
            )


class RemoteSequence:
    """A prompt and an answer in the making; see `parse.model.ModelSequence`."""

    def __init__(self, model: RemoteModel, prompt_ids: Sequence[int]) -> None:
        self.model, self.prompt_ids = model, list(prompt_ids)
        self._stream: Stream | None = None

    async def prefill(self) -> None:
        """Nothing: the first request that needs the prompt reads it."""

    async def decode(
        self,
        ids: Sequence[int],
        limit: int,
        sampling: Sampling = GREEDY,
        stop: Stop | None = None,
        on_token: OnToken | None = None,
        proposer: Proposer | None = None,
    ) -> Written:
        """What the model writes after the prompt and `ids`, as far as its context reaches."""
        model, prefix = self.model, [*self.prompt_ids, *ids]
        room = min(limit, model.context_length - len(prefix))
        if room < 1:
            return Written([], ended=False)
        written = list[int]()
        self._stream = model.client.stream(prefix, room, self._settings(sampling))
        try:
            while some := await self._stream.next():
                for token in some:
                    if sampling.ends(token, model.eos_ids):
                        return Written(written, ended=True)
                    written.append(token)
                    if on_token:
                        on_token(written)
                    if stop and stop(written):
                        return Written(written, ended=False)
        finally:
            self.close()
        return Written(written, ended=False)

    async def verify(self, ids: Sequence[int], draft: Written, ends: Sequence[int], needs: Needs) -> Evidence:
        """The label scores after K prefixes of a draft, the rises of rows, or how likely the draft's tokens are.

        The scores take a request for each label that says yes, the others one that reads all anew: the server keeps no
        such figures in its cache. Entropy is not told, and margins only beside rises.
        """
        query, nothing = [*self.prompt_ids, *ids], torch.empty(0)
        log_prob, margin, scores, rises = nothing, nothing, None, None
        if needs.token_logprobs:
            log_prob = torch.tensor(await self.model.log_probs(query, draft))
        if needs.labels:
            items = [[*draft.ids[:end], *needs.suffix_ids] for end in ends]
            scores = torch.tensor(await self.model.label_scores(query, items, needs.labels))
        if needs.rows:
            rises, margin = await self.model.rises(query, draft, needs.rows)
            log_prob = -margin  # at most; what the real tokens share with the rows is not told
        return Evidence(ends, log_prob, nothing, margin, label_scores=scores, rises=rises)

    def close(self) -> None:
        """Let the server stop what it writes for this sequence."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _settings(self, sampling: Sampling) -> dict[str, Any]:
        model = self.model
        ends = [] if sampling.ignore_eos else sorted(model.eos_ids)
        settings: dict[str, Any] = {"ignore_eos": True, "stop_token_ids": ends, **PLAIN}
        if model.forbidden:
            settings["logit_bias"] = {str(token): FORBIDDEN for token in sorted(model.forbidden)}
        if not sampling.greedy:
            settings |= {"temperature": sampling.temperature, "seed": sampling.next_seed()}
            settings |= {"top_k": sampling.top_k, "top_p": sampling.top_p}
        return settings


def _served(client: Client) -> dict[str, Any]:
    """What the server says of the model that is asked for."""
    reply = client.ask(client.get("/v1/models"))
    if reply.status_code != 200:
        raise client.refusal(reply)
    models = {str(one["id"]): one for one in reply.json()["data"]}
    if not client.model and len(models) == 1:
        client.model = next(iter(models))
    if client.model not in models:
        raise ValueError(
            f"{client.url} serves {', '.join(models)}, not {client.model!r}: name one of these after the #, or start "
            "the server with --served-model-name"
        )
    found: dict[str, Any] = models[client.model]
    if not found.get("root") or not found.get("max_model_len"):
        raise ValueError(f"{client.url} does not tell the model's root and max_model_len: it is no vLLM server")
    return found


def _configurations(kind: Any, sources: Sequence[str]) -> list[Any]:
    """The model's configurations of a kind, of the sources that can be read here."""
    found = []
    for source in sources:
        with contextlib.suppress(OSError, ValueError):
            found.append(kind.from_pretrained(source))
    return found


def _tokenizer_of(source: str, client: Client) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the tokenizer of {client.url}#{client.model} is not to be had here ({source}: {error}): name a folder or "
            "a hub id that has it, {'tokenizer': ...} in target_options or draft_options"
        ) from error


def _check_tokenizer(client: Client, tokenizer: Any) -> None:
    """Refuse a server that splits text into other tokens."""
    body = {"prompt": PROBE, "add_special_tokens": False}
    theirs, ours = client.ask(client.posted("/tokenize", body))["tokens"], encode_text(PROBE, tokenizer)
    if theirs != ours:
        raise ValueError(
            f"{client.url}#{client.model} has another tokenizer than {tokenizer.name_or_path}: it makes {len(theirs)} "
            f"tokens of {PROBE!r}, that one {len(ours)}; name the right one"
        )


def _check_cache(client: Client) -> None:
    """Refuse a server without a prefix cache, where it tells: it would read every prompt anew for each request."""
    reply = client.ask(client.get("/metrics"))
    if re.search(r'vllm:cache_config_info\{[^}]*enable_prefix_caching="False"', reply.text):
        raise ValueError(f"{client.url} has no prefix cache: start it with --enable-prefix-caching")


def _scores(client: Client, labels: list[int]) -> httpx.Response:
    """The reply to a question for the scores of two labels."""
    body = {"query": [0], "items": [[0]], "label_token_ids": labels}
    return client.ask(client.post("/generative_scoring", body))


def _beyond(client: Client, vocabulary: int) -> list[int]:
    """The labels of a served target whose configuration here is that of the target before it was folded."""
    label = vocabulary
    while label < vocabulary + MOST_LABELS and _scores(client, [0, label]).status_code == 200:
        label += 1
    return [*range(vocabulary, label)]


def _provided(client: Client, labels: Sequence[int]) -> frozenset[str]:
    """What of `PROVIDED` the server can give: the scores of labels only where it has the route.

    A folded verifier's rows take what is probable from the real tokens: how likely those are it then cannot tell.
    """
    reply, others = _scores(client, [0, 1]), {"rises"} if labels else {"token_logprobs"}
    if reply.status_code in NO_ROUTE:
        return frozenset(others)
    if reply.status_code != 200:
        raise client.refusal(reply)
    return frozenset({"label_scores", *others})


def cached_share(before: str, after: str) -> float | None:
    """The prefix cache's share of the tokens that a server was given between two readings of its /metrics."""

    def count(name: str, text: str) -> float:
        return sum(map(float, re.findall(rf"^vllm:prefix_cache_{name}_total\{{[^}}]*\}} (\S+)", text, re.M)))

    hits, queries = (count(name, after) - count(name, before) for name in ("hits", "queries"))
    return hits / queries if queries > 0 else None
