import pickle

import pytest

from rft.tasks import TASKS
from rft.tasks.reasoning_gym import score


def scored(rows, completions):
    columns = {k: [row[k] for row in rows] for k in rows[0] if k not in ("prompt", "completion")}
    return score([row["prompt"] for row in rows], completions, **columns)


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("chain_sum", {"max_terms": 3}),
        ("basic_arithmetic", {}),
        ("countdown", {"max_numbers": 4}),
        ("gcd", {}),
    ],
)
def test_right_answers_score_one_and_others_do_not(task, options):
    rows = TASKS["reasoning_gym"](task=task, options=options).rows("train", 20, 1)
    assert scored(rows, [row["completion"] for row in rows]) == [1.0] * 20
    assert scored(rows, [f"so it is\n#### {row['answer']}" for row in rows]) == [1.0] * 20
    # Some verifiers give a hundredth for any answer.
    assert max(scored(rows, ["<answer>a cat</answer>"] * 20)) <= 0.01
    assert max(scored(rows, ["I do not know"] * 20)) <= 0.01


def test_another_right_answer_counts_too():
    row = TASKS["reasoning_gym"](task="countdown").rows("test", 1, 3)[0]
    turned = f"<answer>0 + {row['answer']}</answer>"
    plain = f"<answer>({row['answer']})</answer>"
    assert scored([row], [plain]) == [1.0]
    assert scored([row], [turned])[0] < 1.0  # uses a number that was not given


def test_chat_completions_and_the_last_answer_are_judged():
    row = TASKS["reasoning_gym"](task="chain_sum").rows("train", 1, 1)[0]
    chat = [{"role": "assistant", "content": f"<answer>x</answer> no: {row['completion']}"}]
    assert scored([row], [chat]) == [1.0]


def test_splits_are_disjoint_and_rows_repeatable():
    task = TASKS["reasoning_gym"](task="chain_sum", options={"max_terms": 2, "max_digits": 1})
    train, test = (task.rows(split, n, 1) for split, n in (("train", 300), ("test", 10)))
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in test}
    assert task.rows("train", 300, 1) == train
    assert task.rows("train", 300, 2) != train


def test_rows_cross_process_borders():
    rows = TASKS["reasoning_gym"](task="countdown").rows("train", 3, 1)
    assert scored(pickle.loads(pickle.dumps(rows)), [r["completion"] for r in rows]) == [1.0] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "chain_sums"}, "did you mean 'chain_sum'"),
        ({"task": "chain_sum", "options": {"terms": 3}}, "terms"),
        ({"task": "chain_sum", "options": {"min_terms": -1}}, "min_terms"),
        ({"name": "chain_sum"}, "name"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TASKS["reasoning_gym"](**options)


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="train"):
        TASKS["reasoning_gym"]().rows("dev", 1, 1)
