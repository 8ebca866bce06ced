"""Write a commented config for a model, a dataset and a reward, from the first rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rft.algorithms import ALGORITHMS
from rft.config.data import DataConfig
from rft.config.load import parse_config
from rft.data import DataError, has_held_out, load_rows
from rft.data.messages import is_messages
from rft.errors import ConfigError, ModelError
from rft.learner.load import load_tokenizer
from rft.plan import make_plan
from rft.preflight.memory import ModelShape
from rft.preflight.model import resolve_model
from rft.rewards.load import SpecError, builtin, load_reward, signature_columns
from rft.rewards.types import Outcome
from rft.utils import yaml_files
from rft.utils.did_you_mean import did_you_mean_or_list

SAMPLE = 64  # rows that the settings are chosen from
HELD_OUT = 64  # rows to hold out if the data has no evaluation split

# The columns of common datasets for each of rft's columns, best first.
ALIASES = {
    "prompt": ("prompt", "question", "problem", "instruction", "query", "input", "messages", "conversations"),
    "answer": ("answer", "final_answer", "ground_truth", "gold", "target", "solution", "expected_answer"),
    "completion": ("completion", "response", "output", "demonstration"),
}
CONVERSATIONS = ("messages", "conversations", "conversation")
# Patterns of an answer inside a worked solution, tried in this order.
ANSWER_PATTERNS = (r"####\s*(.+)", r"\\boxed\{([^{}]+)\}")


@dataclass
class Draft:
    """The settings chosen so far, and one line for each assumption."""

    data: dict[str, Any]
    algorithm: str = ""
    rewards: list[dict[str, Any]] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)


def init(
    out: Path,
    model: str,
    data: str | None,
    reward: str | None = None,
    algorithm: str | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write a config to `out`, checked as by `rft check`; `note` gets each assumption.

    data: a file, folder or hub dataset; None: the generated arithmetic task. reward, algorithm: None: chosen
    by the columns. Raises ConfigError if `out` exists, if the columns fit no algorithm, or with the problems
    of the config; then nothing is written.
    """
    if out.exists():
        raise ConfigError([f"{out} exists and is not overwritten: remove it, or name another file"])
    if algorithm is not None and algorithm not in ALGORITHMS:
        known = did_you_mean_or_list(algorithm, ALGORITHMS)
        raise ConfigError([f"--algorithm: unknown algorithm {algorithm!r}{known}"])
    try:
        draft = _draft(data, reward, algorithm)
        text = _text(out.stem, model, draft)
    except (DataError, ModelError, SpecError) as error:
        raise ConfigError([str(error)]) from None
    config = parse_config(yaml_files.parse(text))
    make_plan(config)
    for line in draft.assumed:
        note(line)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    return out


# -- the kind of data ----------------------------------------------------------------------------------


def _draft(path: str | None, reward: str | None, algorithm: str | None) -> Draft:
    if path is None:
        draft = Draft({"kind": "arithmetic"}, algorithm or "grpo")
        draft.assumed.append("data: none given, so the generated task `arithmetic`")
        _choose_reward(draft, [], reward or "math")
        return draft
    source = DataConfig(path=path)
    rows = [dict(row) for row in load_rows(source.model_copy(update={"limit": SAMPLE}))]
    draft = Draft({"path": path})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    kind = _choose_kind(columns, rows, reward)
    draft.algorithm = algorithm or {"preference": "dpo", "unpaired": "kto", "sft": "sft"}.get(kind, "grpo")
    draft.assumed.append(f"algorithm: {draft.algorithm}, from the columns {', '.join(columns)}")
    needed = {
        "preference": ("prompt",),
        "unpaired": ("prompt", "completion"),
        "sft": () if set(columns) & set(CONVERSATIONS) else ("prompt", "completion"),
        "online": ("prompt", "answer"),
    }[kind]
    _map_columns(draft, columns, needed)
    if ALGORITHMS[draft.algorithm].online:
        _choose_reward(draft, _renamed(rows, draft.data.get("columns", {})), reward)
    elif reward is not None:
        raise ConfigError(
            [f"--reward: {draft.algorithm} trains on the rows only; leave it out, or give --algorithm grpo"]
        )
    _hold_out(draft, source)
    return draft


def _choose_kind(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], reward: str | None) -> str:
    """Return preference, unpaired, sft or online. Raises ConfigError for columns that fit none."""
    have = set(columns)
    if {"chosen", "rejected"} <= have or "completions" in have:
        return "preference"
    if "label" in have and have & set(ALIASES["completion"]) and reward is None:
        return "unpaired"
    if reward is not None or have & set(ALIASES["answer"]):
        return "online"
    if any(_ends_with_answer(rows[0].get(name)) for name in CONVERSATIONS):
        return "sft"
    if have & set(ALIASES["prompt"]):
        if have & set(ALIASES["completion"]):
            return "sft"
        raise ConfigError(
            [
                f"the data has prompts, but no gold answers ({', '.join(ALIASES['answer'])}) and no "
                "responses; name a reward that needs none: --reward FILE.py:FUNCTION"
            ]
        )
    raise ConfigError(
        [
            f"the columns {', '.join(columns)} are not among those that rft recognises: a prompt "
            f"({', '.join(ALIASES['prompt'])}) with an answer or a response, `messages`, or `chosen` and "
            "`rejected`; rename them, or write a config with data.columns by hand"
        ]
    )


def _ends_with_answer(value: Any) -> bool:
    return is_messages(value) and (value[-1].get("role") or value[-1].get("from")) in ("assistant", "gpt")


def _map_columns(draft: Draft, columns: Sequence[str], needed: Sequence[str]) -> None:
    """Map the columns that have other names in the data."""
    mapping = {}
    for name in needed:
        theirs = next((alias for alias in ALIASES[name] if alias in columns), None)
        if theirs is not None and theirs != name:
            mapping[name] = theirs
    if mapping:
        draft.data["columns"] = mapping
        draft.assumed += [f"column {theirs} is the {name}" for name, theirs in mapping.items()]


def _renamed(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> list[dict[str, Any]]:
    taken = set(columns.values())
    return [
        {k: v for k, v in row.items() if k not in taken}
        | {name: row[theirs] for name, theirs in columns.items() if theirs in row}
        for row in rows
    ]


def _has_evaluation_split(source: DataConfig) -> bool:
    if source.resolved_kind != "hub":
        return has_held_out(source)
    try:
        load_rows(source, "test")
    except DataError:
        return False
    return True


def _hold_out(draft: Draft, source: DataConfig) -> None:
    """Hold rows out for evaluation if the data has no evaluation split."""
    if _has_evaluation_split(source):
        return
    total = len(load_rows(source))
    held = min(HELD_OUT, total // 10)
    if held:
        draft.data["holdout"] = held
        draft.assumed.append(f"evaluation: {held} of the {total} rows, set aside by the seed")
    else:
        draft.assumed.append(f"evaluation: none, since there are only {total} rows")


# -- the reward ----------------------------------------------------------------------------------------


def _choose_reward(draft: Draft, rows: Sequence[Mapping[str, Any]], reward: str | None) -> None:
    answers = [row["answer"] for row in rows if row.get("answer") is not None]
    pattern = _answer_pattern(answers)
    if pattern is not None:
        draft.data["answer_pattern"] = pattern
        draft.assumed.append(f"answer: the part that `{pattern}` finds in the column")
    if reward is None:
        reward = _guess_reward([_extracted(pattern, answer) for answer in answers])
        draft.assumed.append(f"reward: {reward}, since it reads the answers of the first rows")
    elif ":" not in reward and rows:
        target = builtin(reward)
        missing = [name for name in signature_columns(target)[0] if name not in rows[0]]
        either = getattr(target, "any_of", ())
        missing += either[:1] if not set(either) & rows[0].keys() else ()
        if missing:
            raise ConfigError(
                [f"--reward: {reward} needs the column {missing[0]!r}; the data has {', '.join(rows[0])}"]
            )
    draft.rewards.append({"function": reward})


def _answer_pattern(answers: Sequence[Any]) -> str | None:
    """Return the pattern of the final answer inside worked solutions; None if answers are bare."""
    texts = [answer for answer in answers if isinstance(answer, str)]
    for pattern in ANSWER_PATTERNS:
        if texts and len(texts) == len(answers) and all(re.search(pattern, text) for text in texts):
            return pattern
    return None


def _extracted(pattern: str | None, answer: Any) -> str:
    match = None if pattern is None else re.search(pattern, str(answer))
    return str(answer) if match is None else match[1].strip()


def _guess_reward(answers: Sequence[str]) -> str:
    """Return the strictest built-in reward that accepts each answer as a completion."""
    if answers and all(len(answer) == 1 and answer in "ABCDEFGHIJ" for answer in answers):
        return "choice"
    if answers and _accepts("math", answers):
        return "math"
    return "exact_match" if all(len(answer.split()) <= 3 for answer in answers) else "f1"


def _accepts(reward: str, answers: Sequence[str]) -> bool:
    function: Any = load_reward(reward)
    scores = function.score([""] * len(answers), list(answers), answer=list(answers))
    return all(score.outcome is Outcome.correct for score in scores)


# -- the text ------------------------------------------------------------------------------------------


def _text(name: str, model: str, draft: Draft) -> str:
    """Return the config as commented YAML, with lengths and batch sizes that fit data and model."""
    config = parse_config(
        {
            "algorithm": draft.algorithm,
            "model": {"path": model},
            "data": draft.data,
            "rewards": draft.rewards,
        }
    )
    path = resolve_model(config)
    shape = ModelShape.of(path, config.model, Path(config.output_dir) / ".cache")
    tokenizer = load_tokenizer(path)
    online, rows = config.algorithm.online, load_rows(config.data)
    longest = _longest(rows, tokenizer)
    batch = min(32, len(rows))
    rate = _learning_rate(config.algorithm.online, draft.algorithm, shape.parameters)
    draft.assumed.append(
        f"learning rate: {rate:g}, for {draft.algorithm} on {shape.parameters / 1e6:,.1f} M parameters"
    )
    head = [
        f"# {draft.algorithm} on {draft.data.get('path') or draft.data['kind']}. Check it: `rft check FILE`. "
        "Train: `rft train FILE`.",
        "# Every key with its default and meaning: `rft config`.",
        f"name: {_value(name)}                # the run folder is runs/NAME; the same name resumes",
        "",
        "model:",
        f"  path: {_value(model)}    # a Hugging Face folder or hub name",
        "",
        "data:",
        *(f"  {key}: {_value(value)}{_comment(key)}" for key, value in draft.data.items()),
    ]
    if not online:
        limit = min(_rounded(longest), shape.max_positions)
        head += [
            f"  max_length: {limit}          # tokens of prompt and response together",
            "  overlong: skip            # longer rows are left out and counted",
        ]
        draft.assumed.append(f"lengths: at most {limit} tokens a row")
    lines = [*head, "", f"algorithm: {{name: {draft.algorithm}}}", ""]
    if online:
        prompt = min(_rounded(longest), shape.max_positions // 2)
        answer = min(512, shape.max_positions - prompt)
        draft.assumed.append(f"lengths: prompts of at most {prompt} tokens, completions of {answer}")
        lines.insert(len(head), "  overlong: skip            # longer prompts are left out and counted")
        lines += [
            "rewards:                    # a list; try one on a file: `rft reward NAME FILE.jsonl --explain`",
            *(f"  - {_value(reward)}" for reward in draft.rewards),
            "",
            "train:",
            "  steps: 100",
            f"  batch_size: {batch}            # prompts a step",
            "  num_generations: 8        # completions of each prompt, which are compared with each other",
            "",
            "rollout:",
            "  sampling:",
            f"    max_prompt_length: {prompt}",
            f"    max_completion_length: {answer}",
        ]
    else:
        lines += ["train:", "  steps: 100", f"  batch_size: {batch}            # rows a step"]
    has_test = "holdout" in draft.data or "path" not in draft.data or _has_evaluation_split(config.data)
    every = "20                 # steps" if has_test else "0                  # no rows are held out"
    lines += [
        "",
        "learner:",
        f"  learning_rate: {rate:g}",
        "  tokens_per_micro_batch: auto   # as many as the memory allows; changes no result",
        "",
        "eval:",
        f"  every: {every}",
        "checkpoint:",
        "  every: 20                 # steps; a run that was stopped continues from the last",
    ]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    return yaml_files.dump(value, flow=True).removesuffix("\n").removesuffix("...").strip()


def _comment(key: str) -> str:
    reasons = {
        "path": "    # JSONL, Parquet, Arrow, a folder, or a hub dataset",
        "columns": "    # rft's name: the name in the data",
        "answer_pattern": "    # its group is the answer that rewards compare",
        "holdout": "               # rows for evaluation, not trained on",
    }
    return reasons.get(key, "")


def _longest(rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> int:
    """Return the number of tokens of the longest of the first 1,000 rows."""
    longest = 0
    for index in range(min(len(rows), 1000)):
        row = rows[index]
        texts = [str(row[name]) for name in ("prompt", *CONVERSATIONS, "completion", "chosen") if name in row]
        longest = max(longest, sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts))
    return longest


def _rounded(tokens: int) -> int:
    """Return the next power of two above the tokens of a row and of its chat template, at least 128."""
    size = 128
    while size < tokens + 64:
        size *= 2
    return size


def _learning_rate(online: bool, algorithm: str, parameters: int) -> float:
    """Return a usual learning rate of full fine-tuning: lower for larger models and preference losses."""
    if parameters < 10e6:
        return 3e-4
    large = parameters > 1e9
    if online:
        return 1e-6 if large else 1e-5
    if algorithm == "sft":
        return 1e-5 if large else 5e-5
    return 5e-7 if large else 1e-6
