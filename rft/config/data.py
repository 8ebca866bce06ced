"""What data a run uses: a generated task, local files, or a dataset from the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from rft.config.base import ConfigModel
from rft.utils.paths import PathText

Kind = Literal["arithmetic", "arithmetic_hard", "arithmetic_pairs", "reasoning_gym", "file", "hub"]
_ARITHMETIC: tuple[Kind, ...] = ("arithmetic", "arithmetic_hard", "arithmetic_pairs")
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", ".arrow")

# Fields that mean something for some kinds only; naming one elsewhere is a mistake worth an error.
_ONLY_FOR: dict[str, tuple[Kind, ...]] = {
    "path": ("file", "hub"),
    "eval_path": ("file", "hub"),
    "subset": ("hub",),
    "revision": ("hub",),
    "task": ("reasoning_gym",),
    "options": (*_ARITHMETIC, "reasoning_gym"),
    "holdout": ("file", "hub"),
    "streaming": ("file", "hub"),
}


class SourceClass(ConfigModel):
    """One class of demonstrations by where they came from (class-conditioned fine-tuning)."""

    weight: float = Field(1.0, gt=0, description="weight of a demonstration of this class in the loss")
    prefix: str = Field("", description="text put before the prompt, so that the model knows the class")


class DataConfig(ConfigModel):
    """The prompts, demonstrations or preferences that a run trains on and is evaluated on."""

    kind: Kind | None = Field(
        None,
        description="arithmetic, arithmetic_hard, arithmetic_pairs, reasoning_gym, file or hub; "
        "inferred when unset",
    )
    path: PathText | None = Field(
        None, description="JSONL/JSON/Parquet/Arrow file, a folder of them, or a hub dataset's name"
    )
    eval_path: PathText | None = Field(
        None, description="like `path`, for evaluation; unset: the same as `path`"
    )
    split: str = Field("train", description="split to train on (a folder's files are matched by this name)")
    eval_split: str = Field("test", description="split to evaluate on")
    holdout: int = Field(0, ge=0, description="rows set aside for evaluation where there is no test split")
    subset: str | None = Field(None, description="hub only: the dataset's configuration name")
    revision: str | None = Field(None, description="hub only: branch, tag or commit")
    task: str | None = Field(None, description="reasoning_gym only: name of the task, such as chain_sum")
    options: dict[str, Any] = Field(default_factory=dict, description="options of the generated task")

    columns: dict[str, str] = Field(
        default_factory=dict, description="rft's column name: the name in your data, as in `prompt: question`"
    )
    answer_pattern: str | None = Field(
        None, description="regular expression; its first group, found in `answer`, becomes the answer"
    )
    numbers: tuple[str, ...] = Field(
        (), description="numeric columns handed to the algorithm per sequence (a margin, a weight)"
    )
    sources: dict[str, SourceClass] = Field(
        default_factory=dict, description="per value of the `source` column: its weight and prompt prefix"
    )
    eval_source: str | None = Field(
        None, description="source class whose prefix evaluation prompts get (none: that of their own row)"
    )
    template: str | None = Field(
        None, description="prompt built from columns, as in `Question: {prompt}\\nAnswer:`"
    )
    system: str | None = Field(None, description="system message put before the prompt")
    chat_template: Literal["auto", "never", "always"] = Field(
        "auto", description="render prompts with the tokenizer's chat template: auto = where it has one"
    )
    chat_template_options: dict[str, Any] = Field(
        default_factory=dict, description="extra variables of the chat template, as `enable_thinking: false`"
    )
    train_on: Literal["all", "last"] = Field(
        "all", description="`messages`: put the loss on all assistant turns, or on the last one only"
    )

    limit: int | None = Field(None, ge=1, description="use this many training rows; generated tasks: 8192")
    eval_limit: int | None = Field(None, ge=1, description="use this many evaluation rows; generated: 512")
    max_prompt_length: int | None = Field(None, ge=1, description="longest prompt, in tokens")
    max_length: int | None = Field(
        None, ge=2, description="offline: longest prompt with its completion, in tokens"
    )
    overlong: Literal["reject", "skip", "truncate"] = Field(
        "reject",
        description="a too long row stops the run, is left out, or (completions only) is cut; counted",
    )
    bad_rows: Literal["reject", "skip"] = Field(
        "reject", description="offline: a row that cannot be used stops the run, or is left out; counted"
    )
    streaming: bool = Field(False, description="offline: read row by row instead of loading everything")
    shuffle_buffer: int = Field(10_000, ge=1, description="streaming: rows that are shuffled together")
    shuffle: bool = Field(True, description="visit rows in a new random order each epoch")
    seed: int = Field(0, ge=0, description="seed of the order, of the holdout and of generated tasks")

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        kind = self.resolved_kind
        if kind in ("file", "hub") and not self.path:
            raise ValueError(f"`kind: {kind}` needs `path`")
        if kind == "reasoning_gym" and not self.task:
            raise ValueError("`kind: reasoning_gym` needs `task`, such as `task: chain_sum`")
        for name, kinds in _ONLY_FOR.items():
            if kind not in kinds and getattr(self, name) != type(self).model_fields[name].get_default(
                call_default_factory=True
            ):
                raise ValueError(f"`{name}` has no meaning for `kind: {kind}` (only for {', '.join(kinds)})")
        if self.streaming and self.holdout:
            raise ValueError("`holdout` needs the number of rows, unknown when `streaming`; use `eval_path`")
        if self.eval_source is not None and self.eval_source not in self.sources:
            known = ", ".join(self.sources) or "none"
            raise ValueError(f"`eval_source: {self.eval_source}` is not among `sources` ({known})")
        self._check_pattern()
        return self

    def _check_pattern(self) -> None:
        if self.answer_pattern is None:
            return
        try:
            groups = re.compile(self.answer_pattern).groups
        except re.error as error:
            raise ValueError(f"`answer_pattern` is no regular expression: {error}") from None
        if groups < 1:
            raise ValueError("`answer_pattern` needs a group around the answer, as in '####\\s*(.+)'")

    @property
    def resolved_kind(self) -> Kind:
        """`kind`, or what the other fields imply: an existing path or a data file's name is a file,
        any other path is a name on the hub, a task is reasoning_gym's, and nothing is arithmetic."""
        if self.kind is not None:
            return self.kind
        if self.path is not None:
            local = self.path.startswith((".", "/")) or self.path.endswith(SUFFIXES)
            return "file" if local or Path(self.path).exists() else "hub"
        return "reasoning_gym" if self.task else "arithmetic"
