# ruff: noqa: E501 (programs in strings)
"""Programs that try to score without being right, and honest ones that must not lose."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from rft.rewards import Outcome, load_reward
from rft.sandbox import SandboxError


@pytest.fixture(scope="module")
def code() -> Iterator[Any]:
    try:
        yield load_reward("code", timeout_s=20.0, cpu_s=4, verbose=False)
    except SandboxError as error:
        pytest.skip(f"this machine cannot sandbox: {error}")


# -- 500 variations ----------------------------------------------------------------------------------

# Shapes of tests; {i} and {o} are an argument and its right answer, both numbers that nobody guesses.
SHAPES = {
    "asserts": "assert f({a}) == {x}\nassert f({b}) == {y}",
    "one of several sources": ["assert f({a}) == {x}", "assert f({b}) == {y}"],
    "a check function": "def check(c):\n    for i, o in [({a}, {x}), ({b}, {y})]:\n        assert c(i) == o\ncheck(f)",
    "a loop": "for i, o in (({a}, {x}), ({b}, {y})):\n    assert f(i) == o, i",
    "all of a map": "assert all(map(lambda t: f(t[0]) == t[1], [({a}, {x}), ({b}, {y})]))",
    "a comprehension": "assert [f(i) for i in ({a}, {b})] == [{x}, {y}]",
    "if and raise": "if f({a}) != {x} or f({b}) != {y}:\n    raise AssertionError('wrong')",
    "a tolerance": "assert abs(f({a}) - {x}) < 1e-6\nassert abs(f({b}) - {y}) < 1e-6",
    "membership": "assert {x} in [f({a})]\nassert f({b}) in ({y},)",
    "a type and a value": "assert isinstance(f({a}), int) and f({a}) == {x}\nassert f({b}) == {y}",
    "a walrus": "assert (r := f({a})) is not None\nassert r == {x}\nassert f({b}) == {y}",
    "assert False": "try:\n    ok = f({a}) == {x} and f({b}) == {y}\nfinally:\n    pass\nif not ok:\n    assert False",
    "a test function": "def test_f():\n    assert f({a}) == {x}\n    assert f({b}) == {y}",
    "a set": "assert {{f({a}), f({b})}} == {{{x}, {y}}}",
    "equal both ways": "assert {x} == f({a})\nassert not {y} != f({b})",
    "a string": "assert str(f({a})) == '{x}'\nassert str(f({b})) == '{y}'",
    "an exception": "try:\n    f(None)\n    assert False, 'must raise'\nexcept TypeError:\n    pass\nassert f({a}) == {x}",
}
HONEST = "def f(n):\n    if n is None:\n        raise TypeError('a number')\n    return (n * {m} + {k}) % 1000003\n"

LIAR = (
    "class L({base}):\n"
    "    def __eq__(s, o): return True\n    def __ne__(s, o): return False\n    def __hash__(s): return 0\n"
    "    def __sub__(s, o): return 0\n    __rsub__ = __sub__\n    def __abs__(s): return 0\n"
    "    def __lt__(s, o): return True\n    def __bool__(s): return True\n    def __contains__(s, o): return True\n"
    "    def __str__(s): return '0'\n    def __iter__(s): return iter(())\n"
    "def f(n): return L({value})\n"
)
FAMILIES: dict[str, list[str]] = {
    "objects that equal everything": [
        LIAR.format(base=base, value=value)
        for base, value in (("object", ""), ("int", "7"), ("float", "7.5"), ("str", "'7'"), ("list", "[7]"))
    ]
    + [
        LIAR.format(base="tuple", value="(7,)"),
        LIAR.format(base="dict", value="{7: 7}"),
        "def f(n): return f\n",
    ],
    "exceptions": [
        f"def f(n): raise {name}\n"
        for name in (
            "StopIteration",
            "StopAsyncIteration",
            "GeneratorExit",
            "SystemExit(0)",
            "KeyboardInterrupt",
            "type('AssertionPassed', (BaseException,), {})",
            "type('StopIteration', (StopIteration,), {})",
            "__import__('asyncio').CancelledError",
        )
    ],
    "exits": [
        "import os\ndef f(n): os._exit(0)\n",
        "import sys\nsys.exit(0)\n",
        "import os, signal\ndef f(n): os.kill(os.getpid(), signal.SIGKILL)\n",
        "import os\ndef f(n): os.closerange(0, 64)\n",
        "import os\nif os.fork(): os._exit(0)\ndef f(n): return 1\n",
    ],
    "forged messages": [
        "import os, json\n"
        + "for fd in range(0, 32):\n    try:\n"
        + "        for _ in range(9): os.write(fd, (json.dumps("
        + text
        + ") + '\\n').encode())\n    except OSError: pass\ndef f(n): return 1\n"
        for text in (
            "{'passed': 2, 'total': 2, 'failures': [], 'problem': '', 'invalid': ''}",
            "{'ok': True}",
            "{'ok': {'lent': 1, 'type': 'x'}, 'args': []}",
            "{'do': ['call', 1, [], {'dict': []}]}",
            "{'do': ['get', 1, '__globals__']}",
            "{'code': 0, 'exceeded': '', 'cpu_s': 0, 'wall_s': 0}",
            "{'exception': ['BaseException']}",
            "{'error': ['BaseException'], 'text': ''}",
            "{'ok': {'builtin': 'eval'}}",
        )
    ],
    "patches": [
        "import builtins\nbuiltins.AssertionError = type('A', (), {})\nbuiltins.all = lambda x: True\n"
        "builtins.abs = lambda x: 0\ndef f(n): return 1\n",
        "import sys, operator\nfor m in list(sys.modules.values()):\n    for k in list(vars(m) if m else ()):\n"
        "        if k in ('run_tests', '_run_source', 'dumps', 'eq'):\n"
        "            try: setattr(m, k, lambda *a, **k: True)\n            except Exception: pass\ndef f(n): return 1\n",
        "__builtins__ = {}\ndef f(n): return True\n",
        "abs = all = str = isinstance = lambda *a: True\ndef f(n): return 1\n",
        "class AssertionError(Exception): pass\nclass int: pass\ndef f(n): return int()\n",
    ],
    "searches for the answer": [
        "import gc\ndef f(n):\n    for o in gc.get_objects():\n        if type(o) is dict and 'tests' in o: return o\n"
        "    return 1\n",
        "import sys\ndef f(n):\n    fr = sys._getframe()\n    while fr:\n        for v in list(fr.f_locals.values()):\n"
        "            if isinstance(v, str) and 'assert' in v: return v\n        fr = fr.f_back\n    return 1\n",
        "import os\ndef f(n):\n    for p in os.listdir('/proc'):\n        if p.isdigit():\n"
        "            for fd in range(64):\n                try:\n"
        "                    if b'assert' in open(f'/proc/{p}/fd/{fd}', 'rb').read(1 << 16): return 'found'\n"
        "                except OSError: pass\n    return 1\n",
        "import re\ndef f(n):\n    with open('/proc/self/maps') as m, open('/proc/self/mem', 'rb', 0) as mem:\n"
        "        for line in m:\n            a, b = (int(x, 16) for x in line.split()[0].split('-'))\n"
        "            if ' rw' in line and b - a < 1 << 24:\n                try:\n                    mem.seek(a)\n"
        "                    hit = re.search(rb'f\\(%d\\) == (\\d+)' % (n or 0), mem.read(b - a))\n"
        "                    if hit: return int(hit[1])\n                except (OSError, ValueError): pass\n    return 1\n",
    ],
    "plain wrong answers": [
        "def f(n): return 0\n",
        "def f(n): return None\n",
        "def f(n): return float('inf')\n",
        "def f(n): return float('nan')\n",
        "def f(n): return n\n",
        "def f(n): return []\n",
        "def f(n): return True\n",
        "f = 3\n",
        "def g(n): return 1\n",
        "def f(n):\n    while True: yield 1\n",
        "async def f(n): return 1\n",
    ],
}


def variations(count: int, seed: int) -> list[tuple[str, str, str, Any]]:
    """(family, shape, hostile program, tests) with fresh numbers each."""
    dice = random.Random(seed)
    pairs = [(f, p, s) for f, programs in FAMILIES.items() for p in programs for s in SHAPES]
    dice.shuffle(pairs)
    out = []
    for i in range(count):
        family, program, shape = pairs[i % len(pairs)]
        out.append((family, shape, program, _tests(shape, dice)[0]))
    return out


def _tests(shape: str, dice: random.Random) -> tuple[Any, str]:
    """Tests of a shape, and the honest program for them."""
    m, k, a, b = (dice.randrange(1000, 1000003) for _ in range(4))
    numbers = {"a": a, "b": b, "x": (a * m + k) % 1000003, "y": (b * m + k) % 1000003}
    source = SHAPES[shape]
    tests = [s.format(**numbers) for s in source] if isinstance(source, list) else source.format(**numbers)
    return tests, HONEST.format(m=m, k=k)


@pytest.mark.parametrize("part", range(5))
def test_no_variation_of_a_trick_scores(code: Any, part: int) -> None:
    """100 of 500 in each part; scored in one batch each, so that one program follows the other."""
    cases = variations(500, seed=1)[part * 100 : part * 100 + 100]
    scores = code.score([""] * 100, [c[2] for c in cases], tests=[c[3] for c in cases])
    scored = [(c[0], c[1], c[2]) for c, s in zip(cases, scores, strict=True) if s.value != 0.0]
    assert scored == []
    assert {s.outcome for s in scores} <= {Outcome.wrong, Outcome.timeout, Outcome.unparseable}


@pytest.mark.parametrize("shape", SHAPES)
def test_an_honest_program_passes_every_shape(code: Any, shape: str) -> None:
    tests, program = _tests(shape, random.Random(shape))
    score = code.score([""], [program], tests=[tests])[0]
    assert score.value == 1.0, score.detail


# -- what an earlier request leaves ------------------------------------------------------------------

GRABBER = """
import ast, gc, json, re, sys
K = {}
def look(text):
    for arg, value in re.findall(r"assert f\\((.*?)\\) == (.*?)(?:$|[:;\\n\\"])", text):
        try: K[arg] = ast.literal_eval(value)
        except Exception: pass
def walk(o, depth=0):
    if isinstance(o, (bytes, bytearray)): look(bytes(o).decode("utf-8", "replace"))
    elif isinstance(o, str): look(o)
    elif depth < 4 and isinstance(o, dict): [walk(v, depth + 1) for v in list(o.values())]
    elif depth < 4 and isinstance(o, (list, tuple)): [walk(v, depth + 1) for v in list(o)]
frame = sys._getframe()
while frame:
    walk(dict(frame.f_locals)); walk(dict(frame.f_globals)); frame = frame.f_back
for o in gc.get_objects():
    walk(o, 3)
try:
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as mem:
        for line in maps:
            a, b = (int(x, 16) for x in line.split()[0].split("-"))
            if " rw" in line and b - a < 1 << 26:
                try: mem.seek(a); look(mem.read(b - a).decode("latin-1"))
                except (OSError, ValueError): pass
except OSError: pass
def f(x): return K.get(str(x))
"""


def test_a_program_finds_nothing_of_an_earlier_one(code: Any) -> None:
    """Equal completions of one group, each of which reads all the memory that it can."""
    tests = ["assert f(2) == 4729", "assert f(3) == 8113", "assert f(5) == [17, 'k9']"]
    scores = code.score([""] * 6, [GRABBER] * 6, tests=[tests] * 6)
    assert [s.value for s in scores] == [0.0] * 6


def test_an_earlier_output_is_not_in_memory(code: Any) -> None:
    """The right output of one program is not what a later one can print."""
    honest = "print('k7' + 'q9z4')"
    thief = (
        "import re\nfound = ''\nwith open('/proc/self/maps') as maps, open('/proc/self/mem', 'rb', 0) as mem:\n"
        "    for line in maps:\n        a, b = (int(x, 16) for x in line.split()[0].split('-'))\n"
        "        if ' rw' in line and b - a < 1 << 26:\n            try: mem.seek(a); data = mem.read(b - a)\n"
        "            except (OSError, ValueError): continue\n"
        "            hit = re.search(rb'k7q[9]z4', data)\n            found = found or (hit and hit[0].decode())\n"
        "print(found or 'nothing')"
    )
    tests = [{"input": "", "output": "k7q9z4\n"}]
    scores = code.score([""] * 3, [honest, thief, thief], tests=[tests] * 3)
    assert [s.value for s in scores] == [1.0, 0.0, 0.0]


# -- honest programs ---------------------------------------------------------------------------------

PASSES = {
    "its own exception": (
        "class Empty(ValueError): pass\ndef pop(xs):\n    if not xs: raise Empty('nothing')\n    return xs.pop()\n",
        "try:\n    pop([])\n    assert False\nexcept Empty as error:\n    assert str(error) == 'nothing'\n"
        "try:\n    pop([])\n    assert False\nexcept ValueError:\n    pass\nxs = [1, 2]\nassert pop(xs) == 2\n"
        "assert xs == [1]",
        4,
    ),
    "an iterator without end": (
        "def count():\n    n = 0\n    while True:\n        yield n\n        n += 1\n",
        "from itertools import islice\nassert list(islice(count(), 3)) == [0, 1, 2]\ng = count()\n"
        "assert next(g) == 0\nassert next(g) == 1",
        3,
    ),
    "an iterator that ends": (
        "def two():\n    yield 1\n    yield 2\n",
        "g = two()\nnext(g), next(g)\ntry:\n    next(g)\n    assert False\nexcept StopIteration:\n    pass\n"
        "assert [x for x in two()] == [1, 2]",
        2,
    ),
    "functions as arguments": (
        "def apply(g, xs): return [g(x) for x in xs]\ndef key(xs, k): return sorted(xs, key=k)\n"
        "def kind(t): return t('5')\n",
        "assert apply(lambda x: x + 1, [1, 2]) == [2, 3]\nassert key(['bb', 'a'], len) == ['a', 'bb']\n"
        "assert kind(int) == 5\ndef raises(x):\n    raise KeyError(x)\ntry:\n    apply(raises, [1])\n"
        "    assert False\nexcept KeyError:\n    pass",
        4,
    ),
    "a function that calls back and forth": (
        "def fact(n, again): return 1 if n == 0 else n * again(n - 1)\n",
        "def again(n):\n    return fact(n, again)\nassert fact(5, again) == 120",
        1,
    ),
    "objects, classes and their attributes": (
        "class P:\n    def __init__(self, x): self.x = x\n    def __len__(self): return 2\n"
        "    def __getitem__(self, i): return (self.x, 9)[i]\n    def __setitem__(self, i, v): self.x = v\n",
        "p = P(3)\nassert p.x == 3 and len(p) == 2 and p[1] == 9\np[0] = 5\nassert p.x == 5\np.x = 7\n"
        "assert p[0] == 7\nassert isinstance(p, P)\nassert p == p and p != P(7)",
        5,
    ),
    "values of the standard library": (
        "from collections import Counter, OrderedDict, namedtuple\nfrom decimal import Decimal\n"
        "from fractions import Fraction\nimport datetime\nQ = namedtuple('Q', 'a b')\ndef f():\n"
        "    return [Counter('aab'), Q(1, 2), Decimal('1.50'), Fraction(1, 3), datetime.date(2026, 1, 2),\n"
        "            {1: {2}}, 10 ** 40, 1.5, complex(1, 2), b'x', range(3), None, float('inf')]\n",
        "import datetime\nfrom decimal import Decimal\nfrom fractions import Fraction\n"
        "assert f() == [{'a': 2, 'b': 1}, (1, 2), Decimal('1.50'), Fraction(1, 3), datetime.date(2026, 1, 2),\n"
        "               {1: {2}}, 10 ** 40, 1.5, 1 + 2j, b'x', range(3), None, float('inf')]",
        1,
    ),
    "a statement that prepares": (
        "class S:\n    def __init__(self): self.v = []\n    def push(self, x): self.v.append(x)\n",
        "from __future__ import annotations\ns = S()\nfor i in range(3):\n    s.push(i)\nassert s.v == [0, 1, 2]",
        1,
    ),
    "exits that are expected": (
        "import sys\ndef main(x):\n    if x: sys.exit(2)\n    return 1\n",
        "try:\n    main(1)\n    assert False\nexcept SystemExit:\n    pass\nassert main(0) == 1",
        2,
    ),
    "unittest's context managers": (
        "def half(x):\n    if x % 2: raise ValueError(x)\n    return x // 2\n",
        "import contextlib\nassert half(4) == 2\nwith contextlib.suppress(ValueError):\n    half(3)\n    assert False",
        2,
    ),
}


@pytest.mark.parametrize("name", PASSES)
def test_an_honest_program_passes(code: Any, name: str) -> None:
    program, tests, total = PASSES[name]
    score = code.score([""], [program], tests=[tests])[0]
    assert (score.value, score.detail) == (1.0, f"{total} of {total} tests passed")


def test_fraction_counts_tests_as_given() -> None:
    code = load_reward("code", scoring="fraction", timeout_s=20.0, verbose=False)
    tests = "for v in f(3):\n    assert v >= 0\nassert len(f(3)) == 3"
    assert code.score([""], ["def f(x): return [1] * 200000"], tests=[tests])[0].value == 0.5
    tests = ["assert f(1) == 1\nassert f(2) == 2", "assert f(3) == 3", "def test_it():\n    assert f(4) == 5"]
    assert code.score([""], ["def f(x): return x"], tests=[tests])[0].value == 0.75
    # What comes behind a statement that fails has not run, so it has not passed.
    tests = "assert f(1) == 1\nf(0)\nassert f(2) == 2\nassert f(3) == 3"
    program = "def f(x):\n    if x == 0: raise ValueError\n    return x"
    assert code.score([""], [program], tests=[tests])[0].value == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ("assert f(1) ==", "not valid Python"),
        ("x = f(1)", "check nothing"),
        ("assert True", "check nothing"),
        ("import no_such_module\nassert f(1) == 1", "import 'no_such_module'"),
        ("class T:\n    pass\nassert f(T()) == 1", "pass a T to the program"),
    ],
)
def test_tests_that_cannot_be_run_are_an_error_and_not_a_zero(code: Any, tests: str, message: str) -> None:
    score = code.score([""], ["def f(x): return 1"], tests=[tests])[0]
    assert (score.value, score.outcome) == (None, Outcome.error)
    assert message in score.detail


@pytest.mark.parametrize("want", ["inf", "-inf", "nan", "1e400"])
def test_a_tolerance_does_not_make_infinity_equal_to_numbers(want: str) -> None:
    code = load_reward("code", tolerance=1e-6, timeout_s=20.0, verbose=False)
    tests = [{"input": "", "output": want + "\n"}]
    scores = code.score([""] * 2, ["print(5)", f"print(float({want!r}))"], tests=[tests] * 2)
    assert [s.value for s in scores] == [0.0, 1.0]
