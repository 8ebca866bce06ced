"""Rewards that do to their process and their arguments what a reward should not do."""

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
import time
from decimal import Decimal
from fractions import Fraction

import numpy as np

from rft.rewards import Outcome, Score

CALLS = []


def ones(completions):
    return [1.0] * len(completions)


# -- lists -------------------------------------------------------------------------------------------


def clears(prompts, completions, answer):
    n = len(completions)
    for values in (prompts, completions, answer):
        values.clear()
    return [1.0] * n


def appends(completions, answer):
    completions.append("more")
    answer += answer
    return [1.0] * (len(completions) - 1)


def sorts(completions, answer):
    """Right only where completions and answers still belong together."""
    values = [float(c == a) for c, a in zip(completions, answer, strict=True)]
    completions.sort()
    answer.reverse()
    return values


def nested(prompts, completions, extra):
    for prompt, completion, row in zip(prompts, completions, extra, strict=True):
        assert prompt[0].pop("content")
        assert completion[0]["content"]
        completion[0].clear()
        row["deep"]["list"].append(1)
        assert row["deep"]["list"] == [0, 1]
    return [1.0] * len(completions)


def nested_then_raises(prompts, completions, extra):
    """The calls that look for the sample at fault find their arguments as they were."""
    whole = nested(prompts, completions, extra)
    if len(whole) > 1:
        raise ValueError("too many")
    return whole


def kwargs_pop(completions, **kwargs):
    answers = kwargs.pop("answer")
    while answers:
        answers.pop()
    kwargs.clear()
    return [1.0] * len(completions)


# -- results -----------------------------------------------------------------------------------------


class Lies(list):
    def __len__(self):
        return 3

    def __iter__(self):
        return iter([1.0] * 7)


class NoFloat(float):
    def __float__(self):
        raise RuntimeError("no float")


class NoItem:
    def item(self):
        raise RuntimeError("no item")


class NoRepr:
    def __repr__(self):
        raise SystemExit(0)


RESULTS = {
    "nothing": lambda n: None,
    "one_number": lambda n: 1.0,
    "numpy_number": lambda n: np.float64(1.0),
    "text": lambda n: "1" * n,
    "data": lambda n: b"1" * n,
    "mapping": lambda n: dict.fromkeys(range(n), 1.0),
    "a_set": lambda n: {1.0, 2.0, 3.0},
    "generator": lambda n: (1.0 for _ in range(n)),
    "short": lambda n: [1.0] * (n - 1),
    "long": lambda n: [1.0] * (n + 1),
    "empty": lambda n: [],
    "lies": lambda n: Lies(),
    "nans": lambda n: [float("nan")] * n,
    "infinite": lambda n: [float("-inf")] * n,
    "huge": lambda n: [10**400] * n,
    "complex_numbers": lambda n: [1j] * n,
    "texts": lambda n: ["1.0"] * n,
    "no_float": lambda n: [NoFloat(1.0)] * n,
    "no_item": lambda n: [NoItem()] * n,
    "no_repr": lambda n: [NoRepr()] * n,
    "columns": lambda n: np.ones((n, 2)),
    "score_nan": lambda n: [Score(float("nan"), Outcome.correct)] * n,
    "score_text": lambda n: [Score("1", Outcome.correct)] * n,  # type: ignore[arg-type]
    "score_outcome": lambda n: [Score(1.0, "great")] * n,  # type: ignore[arg-type]
    "score_none": lambda n: [Score(None, Outcome.correct)] * n,
    "score_error_with_value": lambda n: [Score(0.0, Outcome.error, "broken")] * n,
}
GOOD_RESULTS = {
    "array": lambda n: np.ones(n, dtype=np.float16),
    "a_tuple": lambda n: (1.0,) * n,
    "decimals": lambda n: [Decimal("0.5"), Fraction(1, 2), np.float32(1)],
    "booleans": lambda n: [True] * n,
    "score_detail": lambda n: [Score(1.0, Outcome.correct, detail=lambda: 0)] * n,  # type: ignore[arg-type]
}


def _returns(make):
    return lambda completions: make(len(completions))


for _name, _make in {**RESULTS, **GOOD_RESULTS}.items():
    globals()[f"returns_{_name}"] = _returns(_make)


# -- the process -------------------------------------------------------------------------------------


class NotAnException(BaseException):
    pass


def raises_base(completions):
    raise NotAnException("boo")


def exits(completions):
    sys.exit("bye")


def exits_0(completions):
    sys.exit(0)


def interrupts(completions):
    raise KeyboardInterrupt


def recurses(completions):
    return recurses(completions)


def endless_message(completions):
    raise ValueError("x" * 1_000_000)


def hard_exit(completions):
    os._exit(0)


def moves(completions):
    os.chdir("/")
    os.environ.clear()
    os.umask(0o777)
    return ones(completions)


def looks(completions, **kwargs):
    """Finds folder and environment as they were, whoever was called before."""
    here = os.getcwd() != "/" and "PATH" in os.environ
    return [float(here)] * len(completions)


def forks(completions):
    """Both processes come back out of it."""
    os.fork()
    return ones(completions)


def leaves_children(completions):
    subprocess.Popen(["sleep", "987.65"], start_new_session=True)
    if os.fork() == 0:
        time.sleep(987.65)
    return ones(completions)


def prints(completions):
    for _ in range(20):
        print("x" * 10_000)
        print("y" * 100, file=sys.stderr)
    os.write(1, b"raw\n")
    return ones(completions)


def closes_output(completions):
    sys.stdout.close()
    return ones(completions)


def closes_descriptors(completions):
    os.closerange(3, 256)
    return ones(completions)


def writes_descriptors(completions):
    for fd in range(3, 64):
        with contextlib.suppress(OSError):
            os.write(fd, b"\0\0\0\0\0\0\0\x05hello")
    return ones(completions)


def starts_threads(completions):
    for _ in range(20):
        threading.Thread(target=time.sleep, args=(1000,)).start()
    return ones(completions)


def counts(completions):
    """Keeps what it did before, as a module does."""
    CALLS.append(len(completions))
    return [float(len(CALLS))] * len(completions)


async def never_awaits(completions):
    return ones(completions)


async def stops_its_loop(completions):
    asyncio.get_running_loop().stop()
    await asyncio.sleep(1)
    return ones(completions)


async def async_generator(completions):
    yield 1.0


def sleeps(completions):
    time.sleep(100)


async def blocks(completions):
    time.sleep(100)


async def waits_for_ever(completions):
    await asyncio.Event().wait()


def spins(completions):
    while True:
        pass


class Slow:
    def __call__(self, completions):
        time.sleep(100)


# -- signatures --------------------------------------------------------------------------------------


def by_place(prompts, completions, /, answer, *, bonus=1.0):
    return [float(c == a) * bonus for c, a in zip(completions, answer, strict=True)]


def by_place_default(completions, missing=2.0, /):
    return [missing] * len(completions)


def by_name_only(*, completions, answer):
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def anything(*args, **kwargs):
    assert not args
    return [float(c == a) for c, a in zip(kwargs["completions"], kwargs["answer"], strict=True)]


def more_by_place(completions, *rest):
    assert not rest
    return ones(completions)


def trl(prompts, completions, completion_ids, trainer_state=None, log_extra=None, log_metric=None, **kwargs):
    log_extra("first", [ids[0] for ids in completion_ids])
    log_metric("share", 0.25)
    return [trainer_state.global_step / trainer_state.max_steps] * len(completions)


def trl_kwargs(completions, **kwargs):
    kwargs["log_metric"]("share", 0.75)
    return [float(kwargs["trainer_state"].global_step)] * len(completions)


def bad_extra(completions, log_extra):
    log_extra("first", [1])
    return ones(completions)
