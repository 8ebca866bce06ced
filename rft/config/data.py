"""Config section `data`: a generated task, local files, or a dataset on the hub."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from rft.config.base import ConfigModel
from rft.config.mixture import (
    NAME,
    RESERVED,
    AioliConfig,
    MixtureSource,
    aioli_problems,
    checked_templates,
    rate_problems,
)
from rft.utils.paths import PathText

Kind = Literal[
    "arithmetic", "arithmetic_hard", "arithmetic_pairs", "sums", "guess", "reasoning_gym", "file", "hub",
    "mixture",
]  # fmt: skip
_GENERATED: tuple[Kind, ...] = (
    "arithmetic",
    "arithmetic_hard",
    "arithmetic_pairs",
    "sums",
    "guess",
    "reasoning_gym",
)
SUFFIXES = (
    ".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".csv", ".parquet", ".arrow",
)  # fmt: skip

MIXTURE_KEYS = ("kind", "mixture", "mixing", "mixing_temperature", "aioli")  # not those of a source
# Fields that apply to some kinds only; setting one for another kind is an error.
_ONLY_FOR: dict[str, tuple[Kind, ...]] = {
    "path": ("file", "hub"),
    "eval_path": ("file", "hub"),
    "subset": ("hub",),
    "revision": ("hub",),
    "task": ("reasoning_gym",),
    "options": _GENERATED,
    "holdout": ("file", "hub"),
    "streaming": ("file", "hub"),
    "sessions": ("file",),
    "mixture": ("mixture",),
    "mixing": ("mixture",),
    "mixing_temperature": ("mixture",),
    "aioli": ("mixture",),
}


class SourceClass(ConfigModel):
    """Class of demonstrations that share a source (class-conditioned fine-tuning)."""

    weight: float = Field(1.0, gt=0, description="loss weight of demonstrations of this class")
    prefix: str = Field("", description="text prepended to the prompt to identify the class")


class SessionsConfig(ConfigModel):
    """Sessions of `rft collect`, for offline training on the tokens that were sampled."""

    keep: Literal["successes", "best", "all"] = Field(
        "successes",
        description="supervised: successes, the best session of each prompt (RAFT), or all that were scored",
    )
    min_reward: float | None = Field(None, description="only sessions with at least this reward (none: any)")
    pairs: int = Field(
        1,
        ge=1,
        description="preference: maximum pairs of a prompt: the best session against the worst, the second "
        "best against the second worst, ...; equal rewards do not make a pair",
    )


class DirectionsConfig(ConfigModel):
    """Preference directions for two rewards (DPA, arXiv:2402.18571): one is drawn for each row by the seed.

    The angle is uniform in `degrees`, and the direction (round(100 cos), round(100 sin)): integers that the
    template shows and, scaled to length 1, `rewards.direction: row` multiplies the rewards with.
    """

    names: tuple[str, str] = Field(
        description="template fields for the weights of the first and the second reward, from -100 to 100"
    )
    degrees: tuple[float, float] = Field(
        (-45.0, 45.0), description="range of the angle: 0 is the first reward alone, 90 the second"
    )

    @model_validator(mode="after")
    def _check(self) -> DirectionsConfig:
        if self.names[0] == self.names[1] or not all(name.isidentifier() for name in self.names):
            raise ValueError(f"`names` must be two different words, not {' and '.join(self.names)}")
        if not -180 <= self.degrees[0] <= self.degrees[1] <= 180:
            raise ValueError("`degrees` must be two angles from -180 to 180, the smaller one first")
        return self


class DataConfig(ConfigModel):
    """Prompts, demonstrations or preferences for training and evaluation."""

    kind: Kind | None = Field(
        None,
        description="arithmetic, arithmetic_hard, arithmetic_pairs, sums, guess, reasoning_gym, file, hub or "
        "mixture (none: inferred from `path`, `task` and `mixture`)",
    )
    path: PathText | None = Field(
        None,
        description="JSONL, JSON, CSV, Parquet or Arrow file, a folder of such files, or a hub dataset name",
    )
    eval_path: PathText | None = Field(None, description="like `path`, for evaluation (none: same as `path`)")
    split: str = Field("train", description="training split; in a folder, files are matched by this name")
    eval_split: str = Field("test", description="evaluation split")
    holdout: int = Field(0, ge=0, description="rows held out for evaluation if there is no test split")
    subset: str | None = Field(None, description="hub only: configuration name of the dataset")
    revision: str | None = Field(None, description="hub only: branch, tag or commit")
    task: str | None = Field(None, description="reasoning_gym only: name of the task, e.g. chain_sum")
    options: dict[str, Any] = Field(default_factory=dict, description="options of the generated task")

    mixture: dict[str, MixtureSource] = Field(
        default_factory=dict,
        description="named sources whose rows are drawn at given rates, instead of `path`",
    )
    mixing: Literal["fixed", "proportional", "temperature", "aioli"] | None = Field(
        None,
        description="rates of the mixture: fixed (the `rate` of each source), proportional (to the rows of "
        "each), temperature (to rows ** (1 / mixing_temperature)), or aioli (learned during offline "
        "training) (none: fixed if rates are given, else proportional)",
    )
    mixing_temperature: float = Field(
        2.0, gt=0, description="mixing: temperature: 1 is proportional, higher values are more uniform"
    )
    aioli: AioliConfig = Field(AioliConfig(), description="settings of `mixing: aioli`")

    columns: dict[str, str] = Field(
        default_factory=dict,
        description="mapping from rft column names to dataset columns, e.g. `prompt: question`",
    )
    answer_pattern: str | None = Field(
        None, description="regular expression applied to `answer`; its first group becomes the answer"
    )
    numbers: tuple[str, ...] = Field(
        (),
        description="numeric columns passed to the algorithm, one value per sequence (e.g. margin, weight)",
    )
    sources: dict[str, SourceClass] = Field(
        default_factory=dict,
        description="loss weight and prompt prefix for each value of the `source` column",
    )
    eval_source: str | None = Field(
        None, description="source class whose prefix is used for evaluation prompts (none: that of each row)"
    )
    template: str | list[str] | None = Field(
        None,
        description="prompt template over columns, e.g. `Question: {prompt}\\nAnswer:`; of a list, each row "
        "gets one template, drawn by the seed",
    )
    directions: DirectionsConfig | None = Field(
        None, description="preference directions, shown by `template` and read by `rewards.direction: row`"
    )
    system: str | None = Field(None, description="system message prepended to the prompt")
    chat_template: Literal["auto", "never", "always"] = Field(
        "auto", description="render prompts with the tokenizer's chat template; auto: if it has one"
    )
    chat_template_options: dict[str, Any] = Field(
        default_factory=dict, description="additional chat template variables, e.g. `enable_thinking: false`"
    )
    train_on: Literal["all", "last"] = Field(
        "all", description="`messages`: compute the loss on all assistant turns, or only on the last"
    )

    decontaminate: Literal["report", "drop"] = Field(
        "report",
        description="training rows that overlap an evaluation row (equal prompt, or 13 words in common): "
        "report in `rft check`, or drop",
    )
    limit: int | None = Field(
        None,
        ge=1,
        description="maximum training rows; of a mixture, of each source (none: all; generated tasks: 8192)",
    )
    eval_limit: int | None = Field(
        None, ge=1, description="maximum evaluation rows (none: all; generated tasks: 512)"
    )
    max_prompt_length: int | None = Field(None, ge=1, description="maximum prompt length, in tokens")
    max_length: int | None = Field(
        None, ge=2, description="offline: maximum length of prompt and completion together, in tokens"
    )
    overlong: Literal["reject", "skip", "truncate"] = Field(
        "reject",
        description="overlong rows: reject (stop the run), skip, or truncate (completions only); "
        "skipped and truncated rows are counted",
    )
    bad_rows: Literal["reject", "skip"] = Field(
        "reject", description="offline: invalid rows: reject (stop the run), or skip and count them"
    )
    sessions: SessionsConfig | None = Field(
        None,
        description="offline: `path` has sessions of `rft collect`; train on their recorded tokens (none: "
        "rows are texts); `limit` and `holdout` count prompts",
    )
    streaming: bool = Field(False, description="offline: stream rows instead of loading the dataset")
    shuffle_buffer: int = Field(10_000, ge=1, description="streaming: size of the shuffle buffer, in rows")
    shuffle: bool = Field(True, description="reshuffle rows at each epoch")
    seed: int = Field(0, ge=0, description="random seed of data order, holdout and generated tasks")

    @field_validator("template", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        return checked_templates(value)

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        kind = self.resolved_kind
        if kind == "mixture":
            self._check_mixture()
        if kind in ("file", "hub") and not self.path:
            raise ValueError(f"`kind: {kind}` needs `path`")
        if kind == "reasoning_gym" and not self.task:
            raise ValueError("`kind: reasoning_gym` needs `task`, such as `task: chain_sum`")
        for name, kinds in _ONLY_FOR.items():
            if kind not in kinds and getattr(self, name) != type(self).model_fields[name].get_default(
                call_default_factory=True
            ):
                raise ValueError(
                    f"`{name}` does not apply to `kind: {kind}`, only to {', '.join(kinds)}; remove it"
                )
        if self.streaming and self.holdout:
            raise ValueError("`holdout` cannot be combined with `streaming`; remove it, and set `eval_path`")
        if self.streaming and self.decontaminate == "drop":
            raise ValueError(
                "`decontaminate: drop` needs all rows, and `streaming` reads them on demand; remove one of "
                "them"
            )
        if self.directions is not None:
            self._check_directions(self.directions.names)
        if self.sessions is not None:
            self._check_sessions()
        if self.eval_source is not None and self.eval_source not in self.sources:
            known = ", ".join(self.sources) or "none"
            raise ValueError(
                f"`eval_source: {self.eval_source}` is not among `sources` ({known}); add it there"
            )
        self._check_pattern()
        return self

    def _check_directions(self, names: Sequence[str]) -> None:
        """Refuse templates that do not show the policy which direction it is rewarded for."""
        texts = [self.template] if isinstance(self.template, str) else self.template or [""]
        for text in texts:
            shown = [field for _, field, _, _ in string.Formatter().parse(text)]
            for name in names:
                if name not in shown:
                    raise ValueError(
                        f"`directions` needs a `template` that shows the direction: write {{{name}}} in it"
                    )

    def _check_sessions(self) -> None:
        """Refuse settings that would change recorded tokens."""
        texts = ("template", "directions", "system", "sources", "columns", "answer_pattern")
        for name in (*texts, "numbers", "streaming"):
            if getattr(self, name):
                raise ValueError(
                    f"`{name}` does not apply to `sessions`, whose tokens are recorded; remove it, or remove "
                    "`sessions` to encode the column `messages` afresh"
                )
        if self.overlong == "truncate":
            raise ValueError("`overlong: truncate` does not apply to `sessions`: write `skip` or `reject`")

    def _check_mixture(self) -> None:
        if not self.mixture:
            raise ValueError("`kind: mixture` needs `mixture: {NAME: {path: ...}, ...}`")
        for name in self.mixture:
            if not re.match(NAME, name):
                raise ValueError(f"`mixture.{name}`: a name consists of letters, digits, _ and -")
            if name in RESERVED:
                raise ValueError(
                    f"`mixture.{name}`: `reward/{name}` is a metric already; choose another name"
                )
        folded = [name.casefold() for name in self.mixture]
        twice = [name for name in self.mixture if folded.count(name.casefold()) > 1]
        if twice:
            raise ValueError(f"`mixture`: {' and '.join(twice)} differ only in case; choose another name")
        learned = aioli_problems(self.mixture, self.aioli) if self.mixing == "aioli" else []
        if self.mixing != "aioli" and self.aioli != AioliConfig():
            learned = ["`aioli` needs `mixing: aioli`; write it, or leave `aioli` out"]
        for problem in [*rate_problems(self.mixture, self.mixing), *learned]:
            raise ValueError(f"`mixture`: {problem}")
        for name in self.mixture:
            try:
                self._part(name)
            except ValidationError as error:
                first = error.errors()[0]
                key = "".join(f".{part}" for part in first["loc"])
                message = first["msg"].removeprefix("Value error, ")
                raise ValueError(f"`mixture.{name}{key}`: {message}") from None

    def _part(self, name: str) -> DataConfig:
        """Return the config of one source, with the keys of `data` that it does not set."""
        source = self.mixture[name]
        given = {
            k: v for k, v in source if k not in ("rewards", "rate", "epochs", "environment") and v is not None
        }
        shared = {k: v for k, v in self if k not in MIXTURE_KEYS}
        return DataConfig.model_validate({**shared, **given})

    def parts(self) -> dict[str, DataConfig]:
        """Return the config of each source of a mixture, by name in alphabetical order; else {"": self}."""
        return {name: self._part(name) for name in sorted(self.mixture)} or {"": self}

    @property
    def rewards_by_source(self) -> dict[str, list[str]]:
        """Return the names of the rewards that score the rows of a source, for the sources that name some."""
        return {n: source.rewards for n, source in self.mixture.items() if source.rewards is not None}

    def _check_pattern(self) -> None:
        if self.answer_pattern is None:
            return
        try:
            groups = re.compile(self.answer_pattern).groups
        except re.error as error:
            raise ValueError(f"`answer_pattern` is not a valid regular expression: {error}") from None
        if groups < 1:
            raise ValueError("`answer_pattern` needs a group around the answer, as in '####\\s*(.+)'")

    @property
    def resolved_kind(self) -> Kind:
        """Return `kind`, or infer it.

        An existing path or the name of a data file means `file`, any other path `hub`, a task
        `reasoning_gym`, named sources `mixture`, and none of these `arithmetic`.
        """
        if self.kind is not None or self.mixture:
            return self.kind or "mixture"
        if self.path is not None:
            local = self.path.startswith((".", "/")) or self.path.endswith(SUFFIXES)
            return "file" if local or Path(self.path).exists() else "hub"
        return "reasoning_gym" if self.task else "arithmetic"
