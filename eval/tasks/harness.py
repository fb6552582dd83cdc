"""Tasks of EleutherAI's lm-evaluation-harness: `task: lm_eval:NAME`, any that generates text, or a group of such.

Prompts, few-shot examples, stop strings, filters and metrics are the harness's own, loaded by it and run by it; what is
asked here is only whether an answer's score reaches a threshold. The documents that the harness evaluates are the test
split. The others come from the task's training and validation documents, by the hash of their prompts, and where it has
none all four splits come from the one that there is; no prompt is in two.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from importlib.metadata import version
from typing import Any

from eval.tasks.rows import key_of, split_of, words_of
from eval.tasks.task import Prompt, Task
from parse.local.loading import Messages
from parse.prompts import as_messages, split_beginning

PREFIX = "lm_eval:"
SEED = 1234  # of few-shot examples, the harness's default
OTHERS = ("answers", "train", "calibration")


class Harness(Task):
    """A task of the harness, or a group of them, whose prompts are asked as one."""

    def __init__(self, name: str, settings: Mapping[str, Any], shares: Mapping[str, int]) -> None:
        """Load the tasks and their documents.

        Args:
            name: as the harness knows it.
            settings: the recipe's section `data.harness`.
            shares: of the splits, by their names.

        Raises:
            ValueError: for a task that the harness does not know, or that does not generate text, or that runs code
                without `confirm_run_unsafe_code`; for a group of tasks that stop at different strings.
        """
        self.name, self._settings = name, settings
        self.members = [_Member(each, task, settings, shares) for each, task in _load(name, settings).items()]
        stops = {member.stop for member in self.members}
        if len(stops) > 1:
            raise ValueError(
                f"the tasks of {PREFIX}{name} end answers at different strings: name one, such as "
                f"{self.members[0].name}"
            )
        (self.stop,) = stops
        self._read(shares)
        self._member_of = {key: member for member in self.members for key in member.documents}

    def prompts(self, split: str, seed: int) -> Iterator[Prompt]:
        """See `Task`."""
        place = lambda prompt: hashlib.sha256(f"{split} {seed} {key_of(prompt)}".encode()).digest()
        return iter(sorted((prompt for member in self.members for prompt in member.by_split[split]), key=place))

    def check(self, prompt: Prompt, answer: str) -> bool:
        """Whether the answer's score reaches the threshold."""
        return self._member_of[key_of(prompt)].check(prompt, answer)

    def content(self) -> bytes:
        """See `Task`."""
        members = [[member.name, member.by_split, member.documents] for member in self.members]
        content = json.dumps([members, dict(self._settings)], sort_keys=True, default=str)
        return f"{self.name} {version('lm_eval')} {content}".encode()

    def _read(self, shares: Mapping[str, int]) -> None:
        """Deal the documents out to the splits; those that the harness evaluates come first, as it would ask them."""
        words, others = set[str](), [member.others() for member in self.members]
        for member, more in zip(self.members, others, strict=True):
            self.duplicates += member.add(member.evaluated, {"test": 1} if more else shares, words)
        for member, more in zip(self.members, others, strict=True):
            if more:
                member.never_the_document_itself()
                self.duplicates += member.add(more, {split: shares[split] for split in OTHERS}, words)
        if not any(member.has_conversations for member in self.members):
            for member in self.members:
                member.ask_in_text()


class _Member:
    """One task of the harness, with the documents of which no other task of its group has the same prompt."""

    def __init__(self, name: str, task: Any, settings: Mapping[str, Any], shares: Mapping[str, int]) -> None:
        self.name, self._task, self._settings = name, task, settings
        self.stop = tuple(text for text in _until(task) if text)
        self._filter = _filter_of(task, settings["filter"])
        self._metric = _metric_of(task, settings["metric"])
        self.documents: dict[str, Any] = {}  # by `key_of(prompt)`
        self.by_split: dict[str, list[Prompt]] = {split: [] for split in shares}
        task.set_fewshot_seed(SEED)

    @property
    def evaluated(self) -> Iterable[Any]:
        """The documents that the harness evaluates."""
        return self._task.eval_docs  # type: ignore[no-any-return]

    def check(self, prompt: Prompt, answer: str) -> bool:
        """Whether the answer's score reaches the threshold."""
        score, threshold = self.score(prompt, answer), self._settings["threshold"]
        if threshold is None:
            if score not in (0, 1):
                raise ValueError(
                    f"{PREFIX}{self.name}: {self._metric} is {score:.4g} for an answer, which is neither right nor "
                    "wrong: say from which score on it is right, as data.harness.threshold"
                )
            threshold = 1.0 if self._better_when_higher else 0.0
        return score >= threshold if self._better_when_higher else score <= threshold

    def score(self, prompt: Prompt, answer: str) -> float:
        """The harness's metric of one answer."""
        from lm_eval.api.instance import Instance

        document = self.documents[key_of(prompt)]
        instance = Instance("generate_until", document, (prompt, {}), 0, resps=[answer])
        self._filter.apply([instance])
        scores = self._task.process_results(document, [instance.filtered_resps[self._filter.name]])
        score = scores[self._metric]
        if not isinstance(score, int | float):
            raise ValueError(
                f"{PREFIX}{self.name}: {self._metric} is a metric of all answers together and not of one: name another "
                f"as data.harness.metric ({', '.join(scores)})"
            )
        return float(score)

    @property
    def _better_when_higher(self) -> bool:
        return bool(self._task.higher_is_better().get(self._metric, True))

    def others(self) -> list[Any]:
        """Documents beside those that are evaluated."""
        task = self._task
        documents = list(task.training_docs()) if task.has_training_docs() else []
        if task.has_validation_docs() and task.has_test_docs():  # else they are the ones that are evaluated
            documents += task.validation_docs()
        return documents

    def never_the_document_itself(self) -> None:
        """Draw few-shot examples from the others: the harness sees to that for what it evaluates alone."""
        task = self._task
        build, sampler = task.fewshot_context, getattr(task, "sampler", None)
        if sampler is None:
            return
        draw = sampler.sample

        def context(document: Any, *rest: Any, **options: Any) -> Any:
            sampler.sample = lambda n, **_: draw(n, eval_doc=document)
            return build(document, *rest, **options)

        task.fewshot_context = context

    def add(self, documents: Iterable[Any], shares: Mapping[str, int], words: set[str]) -> int:
        """Add documents of which no earlier one has the same prompt; how many there were that have.

        Args:
            words: of all prompts so far.
        """
        duplicates = 0
        for document in documents:
            prompt = self._prompt(document)
            said = words_of(split_beginning(prompt)[0])
            if said in words:
                duplicates += 1
                continue
            words.add(said)
            self.documents[key_of(prompt)] = document
            self.by_split[split_of(said, shares)].append(prompt)
        return duplicates

    @property
    def has_conversations(self) -> bool:
        """Whether any prompt is more than one turn of the user."""
        prompts = (prompt for some in self.by_split.values() for prompt in some)
        return any([turn["role"] for turn in as_messages(prompt)] != ["user"] for prompt in prompts)

    def ask_in_text(self) -> None:
        """Ask every user's turn as text."""
        text = lambda prompt: as_messages(prompt)[0]["content"]
        self.by_split = {split: [text(prompt) for prompt in some] for split, some in self.by_split.items()}
        asked = [prompt for some in self.by_split.values() for prompt in some]
        self.documents = {key_of(prompt): self.documents[key_of(as_messages(prompt))] for prompt in asked}

    def _prompt(self, document: Any) -> Messages:
        """The harness's own context of a document, of which a last message of the assistant begins the answer."""
        messages: list[dict[str, str]] = self._task.fewshot_context(
            document,
            self._task.config.num_fewshot or 0,
            apply_chat_template=True,
            fewshot_as_multiturn=self._settings["fewshot_as_multiturn"],
            chat_template=lambda turns, **_: turns,
            gen_prefix=self._task.doc_to_prefix(document),
        )
        return [{"role": turn["role"], "content": turn["content"]} for turn in messages]


@lru_cache(maxsize=4)
def load_harness(name: str, settings: str, shares: str) -> Harness:
    """The task, loaded once; settings and shares as JSON."""
    return Harness(name, json.loads(settings), json.loads(shares))


def _load(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The harness's task, or those of a group, by their names.

    Raises:
        ValueError: see `Harness`.
    """
    try:
        found: dict[str, Any] = _manager(settings["include_path"]).load(name)["tasks"]
    except ImportError as error:
        raise ValueError(f"task {PREFIX}{name} needs EleutherAI's harness: pip install 'lm_eval>=0.4.13'") from error
    except KeyError as error:
        raise ValueError(
            f"task {PREFIX}{name}: the harness has none of that name; `lm_eval ls tasks` lists them"
        ) from error
    except Exception as error:  # of the hub, of the network, of a task's own code
        raise ValueError(f"task {PREFIX}{name} cannot be loaded: {type(error).__name__}: {error}") from error
    for each, task in found.items():
        _check(each, task, settings)
        if settings["num_fewshot"] is not None:
            task.set_config("num_fewshot", settings["num_fewshot"])
    return found


def _check(name: str, task: Any, settings: Mapping[str, Any]) -> None:
    """Refuse a task that cannot be asked.

    Raises:
        ValueError: see `Harness`.
    """
    if task.OUTPUT_TYPE != "generate_until":
        raise ValueError(f"task {PREFIX}{name} has the output type {task.OUTPUT_TYPE}: name one that generates text")
    if getattr(task, "UNSAFE_CODE", False) and not settings["confirm_run_unsafe_code"]:
        raise ValueError(
            f"task {PREFIX}{name} runs code that a model wrote: on a machine where that may do no harm, set "
            "data.harness.confirm_run_unsafe_code=true"
        )


@lru_cache(maxsize=2)
def _manager(include_path: str | None) -> Any:
    """What the harness knows: reading its thousands of files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def _until(task: Any) -> list[str]:
    until = (task.config.generation_kwargs or {}).get("until") or []
    return [until] if isinstance(until, str) else list(until)


def _filter_of(task: Any, name: str | None) -> Any:
    """The filter of that name, or the last one."""
    filters = {one.name: one for one in task._filters}
    if name is not None and name not in filters:
        raise ValueError(f"data.harness.filter is {name!r}: the task has {', '.join(filters)}")
    return filters[name] if name else task._filters[-1]


def _metric_of(task: Any, name: str | None) -> str:
    """The metric of that name, or the first one."""
    metrics = list(task.aggregation())
    if name is not None and name not in metrics:
        raise ValueError(f"data.harness.metric is {name!r}: the task has {', '.join(metrics)}")
    return name or str(metrics[0])
