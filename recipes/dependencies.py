"""What a stage's outcome depends on: its part of the recipe, models and data by content, and earlier stages' files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from recipes.digests import Digests, content_of, of_values
from recipes.schema import Recipe, to_dict

# the keys of a recipe that a stage depends on, beside the target, the seed and the length of answers
KEYS = {
    "answers": ("answers",),
    "distill": ("draft", "distill"),
    "rollouts": ("segments", "rollouts"),
    "align": ("align",),
    "relabel": ("segments", "rollouts"),
    "verifier": ("segments", "verifier"),
}
# the settings of the engine that a stage depends on
SETTINGS = {"rollouts": ("horizon",), "relabel": ("horizon",), "verifier": ("policy", "handback", "horizon")}
ROWS = {"answers": "answers", "rollouts": "rollouts", "relabel": "rollouts"}  # stages that ask prompts: their sections
COUNTS = {"prompts", "train", "calibration", "test", "recheck", "minutes"}  # how many prompts
RUNNING = {
    "batch_size",
    "server",
    "judge",
}  # keys that say how a stage runs, not what comes out; but what a server is asked
PLACING = {"device_map", "max_memory", "offload_folder"}  # options that say where a model lies, not what it is


class Dependencies:
    """What the stages of a recipe depend on, as plain data.

    Digests of models and of the task are made once, see `forget`.
    """

    def __init__(
        self,
        recipe: Recipe,
        digests: Digests,
        content_of_task: Callable[[Recipe], str],
        record_of: Callable[[str], dict[str, Any]],
    ) -> None:
        """Set up.

        Args:
            content_of_task: gives the digest of what the recipe's task asks and how it checks answers.
            record_of: gives the latest record of a stage, with `hash` and `wrote`; empty where there is none.
        """
        self.recipe, self._digests, self._record_of = recipe, digests, record_of
        self._content_of_task = content_of_task
        self._known: dict[str, str] = {}

    def forget(self) -> None:
        """Look at models and data again: a stage may have written a model that others read."""
        self._known.clear()

    def reads(self, stage: str) -> tuple[str, ...]:
        """The earlier stages whose files a stage reads."""
        drafted = ("distill", "align", "relabel") if self.recipe.aligned else ("distill", "rollouts")
        return {
            "answers": (),
            "distill": ("answers",),
            "rollouts": ("distill",),
            "align": ("distill", "rollouts"),
            "relabel": ("distill", "align"),
            "verifier": drafted,
        }[stage]

    def hash(self, stage: str) -> str:
        """The digest of all that a stage's outcome depends on."""
        return of_values([self.of(stage)])

    def of(self, stage: str) -> dict[str, Any]:
        """All that a stage's outcome depends on."""
        values = self._of_settings(stage)
        if stage in ROWS:
            values["prompts"] = self._digest("prompts")
        if stage == "rollouts" and self.recipe.aligned:
            values["pairs"] = self.recipe.align.prompts  # the rollouts are of these, and of no others
        return values

    def of_kept(self, stage: str) -> dict[str, Any]:
        """All that what a stage keeps on its way depends on: a row is kept by its prompt, whatever others there are."""
        values = self._of_settings(stage)
        if stage == "verifier":  # evidence is kept by layer and draft
            return {key: value for key, value in values.items() if key != "verifier"}
        if stage not in ROWS:
            return self.of(stage)
        section = ROWS[stage]
        values[section] = {key: value for key, value in values[section].items() if key not in COUNTS}
        if stage == "answers":
            del values["seed"]
        return values

    def _of_settings(self, stage: str) -> dict[str, Any]:
        content, engine = to_dict(self.recipe), self.recipe.engine
        values: dict[str, Any] = {key: _that_matters(content[key]) for key in ("seed", *KEYS[stage])}
        values["engine"] = {key: content["engine"][key] for key in ("max_new_tokens", *SETTINGS.get(stage, ()))}
        roles = {"target": engine.target_options, "draft": engine.draft_options}
        values["options"] = {
            role: {name: value for name, value in options.items() if name not in PLACING}
            for role, options in roles.items()
        }
        values["target"] = self._digest("target")
        if stage == "distill" and isinstance(self.recipe.draft, str):
            values["draft"] = self._digest("draft")
        if stage == "distill" and values["distill"].pop("lora_from") is not None:
            values["lora_from"] = self._digest("lora_from")
        for earlier in self.reads(stage):
            record = self._record_of(earlier)
            files = content_of(record.get("wrote", {}))
            values[f"files of {earlier}"] = [self.hash(earlier), record.get("hash"), files]
        return values

    def _digest(self, what: str) -> str:
        if what not in self._known:
            make: dict[str, Callable[[], str]] = {
                "target": lambda: self._digests.of_model(self.recipe.target),
                "draft": lambda: self._digests.of_model(str(self.recipe.draft)),
                "lora_from": lambda: self._digests.of_model(str(self.recipe.distill.lora_from)),
                "prompts": lambda: self._content_of_task(self.recipe),
            }
            self._known[what] = make[what]()
        return self._known[what]


def _that_matters(section: Any) -> Any:
    """A section without what does not change its stage's outcome."""
    if not isinstance(section, dict) or not RUNNING & section.keys():
        return section
    kept = {key: value for key, value in section.items() if key not in RUNNING}
    if judge := section.get("judge"):
        kept["judge"] = _asked_of(judge)
    return kept | (_asked_of(server) if (server := section.get("server")) else {})


def _asked_of(server: dict[str, Any]) -> dict[str, Any]:
    """Of a server's section what decides what it says."""
    return {key: server[key] for key in ("model", "extra_body") if server[key] != {}}
