"""The guessing game: its answers, its demonstrations, and the environment of the example."""

import pytest

from examples.environments.guess import Guess as Environment
from rft.tasks import TASKS
from rft.tasks.guess import Game, Guess
from rft.tasks.tiny import build_tokenizer


def test_a_game_by_hand():
    game = Game(57, 1, 200)
    assert game.situation() == "1 to 200"
    assert game.guess("50") == ("higher\n51 to 200", False)
    assert game.guess("60") == ("lower\n51 to 59", False)
    assert game.guess("190") == ("lower\n51 to 59", False), "a guess outside of the range teaches nothing"
    assert game.guess("I say 57!") == ("right", True)


@pytest.mark.parametrize("text", ["", "higher", "12345", "9" * 5000, "-"])
def test_a_guess_without_a_number_is_answered(text):
    assert Game(57, 1, 200).guess(text) == ("no number\n1 to 200", False)


def test_halving_always_wins_in_eight_and_a_random_player_in_four_of_ten():
    for number in range(1, 256):
        game = Game(number, 1, 255)
        guesses = 1
        while not game.guess(str((game.low + game.high) // 2))[1]:
            guesses += 1
        assert guesses <= 8
    rows = Guess().rows("train", 4000, 1)
    found = [row["completion"][-1]["content"] == row["answer"] for row in rows]
    assert 0.35 < sum(found) / len(found) < 0.5


def test_a_demonstration_is_a_game():
    for row in Guess().rows("train", 200, 3):
        game = Game(row["number"], 1, 200)
        assert row["prompt"] == "Guess my number.\n1 to 200"
        said = row["completion"]
        assert said[-1]["role"] == "assistant" and len(said) <= 15
        for guess, answer in zip(said[::2], [*said[1::2], None], strict=True):
            assert game.low <= int(guess["content"]) <= game.high
            text, right = game.guess(guess["content"])
            assert answer == (None if answer is None else {"role": "user", "content": text})
            assert right == (guess["content"] == row["answer"])


def test_careless_players_ignore_the_answers_at_times():
    """Within 5 tries careful players find a number up to 20 in 70 % of games; at random, in 23 %."""
    shares = []
    for careless in (0.0, 0.75, 1.0):
        rows = Guess(largest=20, tries=5, careless=careless).rows("train", 4000, 1)
        shares.append(sum(row["completion"][-1]["content"] == row["answer"] for row in rows) / len(rows))
    assert shares == pytest.approx([0.696, 0.331, 0.226], abs=0.03)


def test_all_numbers_are_in_both_splits():
    """A policy learns which numbers are never right: held-out ones it would never guess."""
    train, test = ({row["number"] for row in Guess().rows(split, 3000, 1)} for split in ("train", "test"))
    assert train == test == set(range(1, 201))
    assert Guess().rows("train", 30, 1) != Guess().rows("test", 30, 1)


def test_rows_are_the_same_for_the_same_arguments_only():
    task = TASKS["guess"]()
    assert task.rows("train", 30, 1) == task.rows("train", 30, 1) != task.rows("train", 30, 2)
    with pytest.raises(ValueError, match="split"):
        task.rows("valid", 1, 1)


def test_an_answer_takes_few_tokens():
    tokenizer = build_tokenizer(task="guess")
    assert len(tokenizer("higher\n101 to 200")["input_ids"]) == 6


def test_the_environment_pays_for_the_number_and_for_what_a_guess_rules_out():
    """Of 200 numbers 99 are left, then one: ln(200/99) / ln(200) = 0.1327 of the way."""
    game = Environment(tries=3)
    assert game.reset(number=57, largest=200, answer="57") is None
    text, first, *ends = game.step("100")
    assert (text, *ends) == ("lower\n1 to 99", False, False, {})
    assert first == pytest.approx(0.4 * 0.13272, abs=1e-5)
    text, second, *ends = game.step("57")
    assert (text, *ends) == ("right", True, False, {}) and first + second == pytest.approx(1.0)
    assert Environment(progress=0.0).reset(number=57, largest=200) is None


def test_a_game_that_is_lost_pays_less_than_half():
    """So that it does not count as solved, however little is left."""
    game = Environment(tries=8)
    game.reset(number=57, largest=200)
    steps = [game.step(str(guess)) for guess in (58, 1, 2, 3, 55, 56, 56, "no idea")]
    assert [done for *_, done, _ in steps] == [False] * 7 + [True]
    assert not any(found for _, _, found, *_ in steps)
    assert 0.35 < sum(reward for _, reward, *_ in steps) < 0.4 + 1e-9
    assert [reward for _, reward, *_ in steps[-2:]] == [0.0, 0.0], "nothing was ruled out"
