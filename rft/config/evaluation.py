"""Config section `eval`: held-out evaluation, on the held-out rows of `data` and on named sets."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_validator, model_validator

from rft.config.base import UNLISTED, ConfigModel
from rft.config.data import DataConfig
from rft.config.rewards import RewardsConfig, list_as_functions

_NAME = re.compile(r"[A-Za-z][\w\-]*")
OF_SAMPLES = ("samples", "temperature", "top_p", "greedy", "rerank", "decline")  # settings of a sampled set
TAKEN = ("outcome", "session")  # second parts of metrics of the unnamed set: `eval/outcome/correct`


def _regular_expression(value: str | None) -> str | None:
    """Return the value. Raises ValueError if it is not a regular expression."""
    if value is not None:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a valid regular expression: {error}") from None
    return value


class EvalSetConfig(ConfigModel):
    """A named held-out set. Settings that are none are those of `eval`."""

    data: DataConfig = Field(
        description="rows of the set, with the keys of `data`: its evaluation split if it has one, else all",
        json_schema_extra=UNLISTED,
    )
    rewards: RewardsConfig | None = Field(
        None,
        description="reward functions of the set, which is then sampled without an environment (none: the "
        "run's rewards and environment; offline, the loss on the rows instead of samples)",
        json_schema_extra=UNLISTED,
    )
    problems: int | None = Field(None, ge=1, description="number of rows")
    samples: int | None = Field(None, ge=1, description="samples per problem")
    temperature: float | None = Field(None, gt=0, description="sampling temperature")
    top_p: float | None = Field(None, gt=0, le=1, description="nucleus sampling (top-p)")
    greedy: bool | None = Field(None, description="also measure greedy decoding")
    rerank: str | None = Field(None, description="reward function that chooses the best of the samples")
    decline: str | None = Field(None, description="regular expression of completions that decline to answer")
    max_completion_length: int | None = Field(
        None, ge=1, description="maximum completion length, in tokens (none: that of rollout.sampling)"
    )

    _decline = field_validator("decline")(_regular_expression)

    @field_validator("rewards", mode="before")
    @classmethod
    def _list_of_rewards(cls, value: Any) -> Any:
        return list_as_functions(value)


class EvalConfig(ConfigModel):
    """Held-out evaluation: rewards of sampled completions; offline, the loss on examples."""

    every: int = Field(
        20, ge=0, description="interval between evaluations, in steps, besides the first and last (0: none)"
    )
    problems: int = Field(512, ge=1, description="number of held-out problems (online) or rows (offline)")
    samples: int = Field(4, ge=1, description="samples per problem, for mean accuracy, pass@k and maj@k")
    temperature: float = Field(1.0, gt=0, description="sampling temperature of evaluation")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling (top-p) of evaluation")
    greedy: bool = Field(True, description="also measure accuracy of greedy decoding")
    rerank: str | None = Field(
        None,
        description="name of the reward function that chooses the best of the samples, for `eval/best@n`",
    )
    decline: str | None = Field(
        None,
        description="regular expression found in completions that decline to answer, such as "
        "`(?i)i (do not|don't) know`, for `eval/declined` and `eval/accuracy_answered`",
    )
    generate: bool = Field(
        False, description="offline: also sample completions of held-out prompts and score them by `rewards`"
    )
    sets: dict[str, EvalSetConfig] = Field(
        {}, description="further held-out sets by name, each with metrics `eval/NAME/...`"
    )

    _decline = field_validator("decline")(_regular_expression)

    @model_validator(mode="after")
    def _names(self) -> EvalConfig:
        for name in self.sets:
            if not _NAME.fullmatch(name) or name in TAKEN:
                raise ValueError(
                    f"sets.{name}: write a name of letters, digits, - and _ that starts with a letter, other "
                    f"than {' and '.join(TAKEN)}"
                )
        return self

    def of_set(self, name: str) -> EvalConfig:
        """Return the settings of a named set ("": the unnamed one). A set with rewards does not
        inherit `rerank`, the name of one of the run's."""
        if not name:
            return self
        given = {key: getattr(self.sets[name], key) for key in ("problems", *OF_SAMPLES)}
        settings = {key: value for key, value in given.items() if value is not None}
        if self.sets[name].rewards is not None:
            settings["rerank"] = given["rerank"]
        return self.model_copy(update=settings)

    def sampled_sets(self, *, online: bool) -> list[str]:
        """Return the names of the sets whose prompts are sampled; the others measure the loss on their
        rows."""
        return [name for name, s in self.sets.items() if online or s.rewards is not None]
