import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rft.tasks import TASKS
from rft.tasks.arithmetic import Arithmetic, Chain, HardArithmetic, solve, story_of, style_of


def says(completion: str) -> list[tuple[int, str, int, int]]:
    """The (left, operator, right, result) of each line of a `lines` solution."""
    found = re.findall(r"^(\d+)([+*-])(\d+)=(\d+)$", completion, re.MULTILINE)
    return [(int(a), op, int(x), int(b)) for a, op, x, b in found]


def test_rows_are_the_same_for_the_same_arguments_only():
    task = TASKS["arithmetic"]()
    assert task.rows("train", 50, 1) == task.rows("train", 50, 1)
    assert task.rows("train", 50, 1) != task.rows("train", 50, 2)
    assert task.rows("train", 80, 1)[:50] == task.rows("train", 50, 1)


@pytest.mark.parametrize("options", [{}, {"variant": "hard"}, {"form": "expression", "max_operands": 6}])
def test_training_and_held_out_problems_are_disjoint(options):
    def problems(split, seed):
        rows = Arithmetic(**{"min_operands": 2, **options}).rows(split, 2000, seed)
        # The numbers and signs alone, whatever the story around them.
        words = {"finds": "+", "buys": "+", "gets": "+", "loses": "-", "sells": "-", "uses": "-"}
        for row in rows:
            text = re.sub("|".join(words), lambda m: words[m[0]], row["prompt"])
            yield "".join(re.findall(r"\d+|[+*-]", text))

    assert not {*problems("train", 1), *problems("train", 7)} & {*problems("test", 1), *problems("test", 9)}


def test_about_a_tenth_of_the_problems_is_held_out():
    chains = [Chain(a, (("+", b),)) for a in range(50) for b in range(50)]
    assert 0.08 < sum(c.split == "test" for c in chains) / len(chains) < 0.12


@given(seed=st.integers(0, 10**9), hard=st.booleans(), form=st.sampled_from(["words", "expression", "mixed"]))
@settings(max_examples=50, deadline=None)
def test_without_mistakes_every_step_and_the_answer_are_right(seed, hard, form):
    task = Arithmetic(
        variant="hard" if hard else "standard",
        wrong_fraction=0,
        form=form,
        operators=("+", "-", "*"),
        styles={"lines": 1},
    )
    for row in task.rows("train", 5, seed):
        steps = says(row["completion"])
        results = [{"+": a + x, "-": a - x, "*": a * x}[op] for a, op, x, _ in steps]
        assert results == [b for *_, b in steps]
        assert [a for a, *_ in steps[1:]] == results[:-1]
        assert row["completion"].endswith(f"\n#### {results[-1]}") and row["answer"] == str(results[-1])
        assert all(0 <= r <= task.config.limit for r in results)
        assert row["mistakes"] == 0
        if "?" in row["prompt"] and row["prompt"].endswith("=?\n"):
            assert eval(row["prompt"][:-3]) == results[-1]


def test_the_share_of_wrong_steps_is_the_one_asked_for():
    task = Arithmetic(
        wrong_fraction=0.25, styles={"lines": 1}, min_operands=4, max_operands=4, slips=[-10, -1, 2]
    )
    rows = task.rows("train", 2000, 3)
    steps = [s for row in rows for s in says(row["completion"])]
    off = [b - (a + x if op == "+" else a - x) for a, op, x, b in steps]
    assert len(steps) == 6000
    assert set(off) == {0, -10, -1, 2}
    assert sum(d != 0 for d in off) == sum(row["mistakes"] for row in rows)
    assert sum(d != 0 for d in off) / len(steps) == pytest.approx(0.25, abs=0.025)


def test_each_format_has_its_own_share_of_mistakes():
    task = Arithmetic(styles={"lines": 1, "chain": 1, "code": 1}, wrong_fraction={"lines": 0, "chain": 1})
    rows = task.rows("train", 300, 3)
    assert all(row["mistakes"] == 0 for row in rows if row["style"] != "chain")
    assert all(row["mistakes"] > 0 for row in rows if row["style"] == "chain")


def test_answers_stay_right_where_the_demonstration_slips():
    rows = Arithmetic(wrong_fraction=1.0).rows("train", 200, 1)
    clean = Arithmetic(wrong_fraction=0.0).rows("train", 1, 1)[0]
    assert rows[0]["answer"] == clean["answer"] and rows[0]["prompt"] == clean["prompt"]
    assert any(not row["completion"].endswith(f"#### {row['answer']}") for row in rows)


CHAIN = Chain(17, (("+", 5), ("*", 3), ("-", 8)))


@pytest.mark.parametrize(
    ("style", "text"),
    [
        ("lines", "17+5=22\n22*3=66\n66-8=58\n#### 58"),
        ("chain", "=22=66=58\n#### 58"),
        ("prose", "17 plus 5 is 22. 22 times 3 is 66. 66 minus 8 is 58. The answer is \\boxed{58}"),
        ("code", "x=17\nx+=5 # 22\nx*=3 # 66\nx-=8 # 58\n#### 58"),
        ("direct", "#### 58"),
    ],
)
def test_formats(style, text):
    assert solve(CHAIN, [22, 66, 58], style) == text
    assert style_of(text) == style
    assert CHAIN.answer == 58 and CHAIN.expression() == "(17+5)*3-8"


@pytest.mark.parametrize("text", ["", "Hello there", "17 plums", "?"])
def test_other_text_has_no_format(text):
    assert style_of(text) is None


def test_a_story_names_every_number_in_order():
    from random import Random

    story = story_of(CHAIN, Random(0))
    assert re.findall(r"\d+", story) == ["17", "5", "3", "8"] and story.endswith("How many now?\n")


def test_styles_are_mixed_by_their_weights():
    rows = Arithmetic(styles={"lines": 3, "code": 1}).rows("train", 1000, 1)
    assert all(style_of(row["completion"]) == row["style"] for row in rows)
    assert sum(row["style"] == "code" for row in rows) / 1000 == pytest.approx(0.25, abs=0.05)


def test_the_hard_variant_is_a_set_of_defaults():
    assert HardArithmetic().config == Arithmetic(variant="hard").config
    assert Arithmetic(variant="hard", wrong_fraction=0.1).config.wrong_fraction == 0.1
    assert HardArithmetic().config.min_operands > Arithmetic().config.min_operands


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"operand": 3}, "operand"),
        ({"wrong_fraction": 1.5}, "wrong_fraction"),
        ({"operators": ["/"]}, "operators"),
        ({"operators": []}, "operators"),
        ({"min_operands": 5, "max_operands": 3}, "min_operands"),
        ({"slips": [0, 1]}, "slips"),
        ({"styles": {"lines": 0}}, "styles"),
        ({"styles": {"verse": 1}}, "styles"),
        ({"largest": 50, "limit": 20}, "largest"),
    ],
)
def test_bad_options_are_named(options, word):
    with pytest.raises(ValidationError, match=word):
        Arithmetic(**options)


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="train"):
        Arithmetic().rows("validation", 1, 1)


def test_the_default_problems_have_three_numbers() -> None:
    """The demos and all committed learning results mean these."""
    config = Arithmetic().config
    assert (config.min_operands, config.max_operands) == (3, 3)
