"""Generate `docs/metrics.md` from the tables: `python -m rft.tools.metric_docs > docs/metrics.md`."""

from __future__ import annotations

from rft.metrics.names import EVENTS, METRICS


def markdown() -> str:
    """Return the text of `docs/metrics.md`."""
    lines = [
        "# Metrics and events",
        "",
        "Generated from `rft/metrics/names.py` by `python -m rft.tools.metric_docs > docs/metrics.md`.",
        "",
        "## `metrics.jsonl`",
        "",
        "One JSON object per step. A key is present if its part of the run took place: `eval/*` only on",
        "steps that evaluate. `null` stands for NaN or an infinity; an event `metric/non_finite` says which.",
        "A `*` stands for any text. Shares lie between 0 and 1.",
        "",
        "| name | meaning | unit |",
        "|---|---|---|",
        *(f"| `{name}` | {m.meaning} | {m.unit} |" for name, m in METRICS.items()),
        "",
        "## `events.jsonl`",
        "",
        "One JSON object per event: `time` (seconds since 1970, UTC), `clock` (monotonic seconds of the",
        "writing process), `kind`, and the fields of that kind.",
        "",
        "| kind | meaning: fields |",
        "|---|---|",
        *(f"| `{kind}` | {meaning} |" for kind, meaning in EVENTS.items()),
        "",
        "## `samples.jsonl`",
        "",
        "One JSON object per completion: `step`, `split` (train or eval), `prompt`, `completion`, `reward`,",
        "`scores` (by reward function), `outcome`, `finish` (stop, length), `version` (policy version).",
        "A session in an environment also has its transcript: `messages` after the prompt, with tool calls",
        "and results, and `spans`, its tokens in order: `text` and number of `tokens` of a part that one",
        "side wrote. A part that the policy sampled has the `turn` (from 1 on), the policy `versions` that",
        "sampled it and the turn's `reward`; `branch` marks a part that does not follow the one before.",
        "",
        "## After a resume",
        "",
        "Lines after the step that the run resumed at were written by the process that died. They move to",
        "`metrics.superseded.jsonl` and `samples.superseded.jsonl`; events are not moved.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(), end="")
