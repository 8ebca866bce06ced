# ruff: noqa: E501 (programs in strings)
"""Styles of tests that datasets have: honest programs pass them, and a program that equals everything does not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from rft.rewards import Outcome, load_reward
from rft.sandbox import SandboxError

STYLES: dict[str, tuple[str, str]] = {
    "ndarray": (
        "import numpy as np\ndef f(n): return np.arange(n)*2",
        "import numpy as np\nassert np.array_equal(f(3), np.array([0,2,4]))\nassert np.allclose(f(2),[0,2])\nassert f(3).sum()==6\nassert (f(3)==np.array([0,2,4])).all()",
    ),
    "ndarray in, in place": (
        "def f(a): a[0]=9",
        "import numpy as np\nx=np.zeros(3)\nf(x)\nassert x.tolist()==[9,0,0]",
    ),
    "object array": (
        "import numpy as np\ndef f(): return np.array([{1:2},None],dtype=object)",
        "import numpy as np\nassert f()[0]=={1:2}",
    ),
    "longdouble": (
        "import numpy as np\ndef f(): return np.float32(1.5), np.int64(3), np.bool_(True)",
        "assert f()==(1.5,3,True)",
    ),
    "deque counter": (
        "from collections import *\ndef f(): return deque([1,2],maxlen=3)\ndef g(): return Counter('aab')\ndef h():\n d=defaultdict(list); d['a'].append(1); return d\ndef o(): return OrderedDict(a=1)",
        "from collections import deque, Counter, OrderedDict\nassert f()==deque([1,2])\nassert g().most_common(1)==[('a',2)]\nassert g()==Counter('aba')\nassert h()=={'a':[1]} and h()['z']==[]\nassert o()==OrderedDict(a=1)",
    ),
    "named": (
        "from collections import namedtuple\nfrom typing import NamedTuple\nP=namedtuple('P','x y')\nclass Q(NamedTuple):\n a:int\n b:int=2\ndef f(): return P(1,2)\ndef g(): return Q(1)",
        "assert f().x==1 and f()==(1,2)\nassert g().b==2\nx,y=f()\nassert x==1\nassert f()==P(1,2)",
    ),
    "timedelta": (
        "import datetime\ndef f(): return datetime.timedelta(days=3)",
        "from datetime import timedelta\nassert f()==timedelta(days=3)",
    ),
    "dataclass": (
        "from dataclasses import dataclass\n@dataclass(order=True,frozen=True)\nclass P:\n x:int\n y:int\n def __add__(s,o): return P(s.x+o.x,s.y+o.y)\ndef f(p): return P(p.y,p.x)",
        "assert f(P(1,2))==P(2,1)\nassert P(1,2)!=P(1,3)\nassert P(1,2)<P(2,0)\nassert P(1,2)+P(1,1)==P(2,3)\nassert {P(1,2)}=={P(1,2)}\nassert [f(P(1,2))]==[P(2,1)]\nassert sorted([P(2,0),P(1,0)])[0]==P(1,0)\nassert max(P(1,1),P(3,0)).x==3",
    ),
    "async": (
        "import asyncio\nasync def f(x):\n await asyncio.sleep(0.01)\n return x*2\nasync def g():\n for i in range(3): yield i",
        "import asyncio\nassert asyncio.run(f(2))==4\nasync def main():\n    a,b=await asyncio.gather(f(1),f(2))\n    assert (a,b)==(2,4)\n    assert [x async for x in g()]==[0,1,2]\nasyncio.run(main())\nasync def test_it():\n    assert await f(5)==10",
    ),
    "unittest": (
        "def f(x):\n if x<0: raise ValueError('neg')\n return x*2",
        "import unittest\nclass T(unittest.TestCase):\n    def setUp(self): self.k=2\n    def test_a(self):\n        self.assertEqual(f(self.k),4)\n        self.assertAlmostEqual(f(1.5),3.0)\n    def test_b(self):\n        with self.assertRaises(ValueError): f(-1)\n        with self.subTest(i=1): self.assertTrue(f(1))\nif __name__=='__main__':\n    unittest.main()",
    ),
    "pytest": (
        "def f(x):\n if x<0: raise ValueError('neg')\n return x*2",
        "import pytest\nfrom solution import f\nimport solution\n@pytest.mark.parametrize('a,b',[(1,2),(2,4)])\ndef test_p(a,b): assert f(a)==b\n@pytest.mark.parametrize('a',[1,pytest.param(2)])\n@pytest.mark.parametrize('k',[2])\ndef test_q(a,k): assert solution.f(a)==k*a\ndef test_r():\n    with pytest.raises(ValueError, match='neg'): f(-1)\n    assert f(1.5)==pytest.approx(3.0)\nclass TestX:\n    def test_m(self): assert f(3)==6",
    ),
    "solution class": (
        "class Solution:\n    def twoSum(self,nums,t):\n        for i,a in enumerate(nums):\n            for j in range(i): \n                if a+nums[j]==t: return [j,i]",
        "assert Solution().twoSum([2,7],9)==[0,1]\ns=Solution()\nassert s.twoSum(nums=[3,3],t=6)==[0,1]",
    ),
    "math": (
        "import math\ndef f(r): return math.pi*r*r",
        "assert math.isclose(f(1),3.14159265,rel_tol=1e-3)\nassert isclose(f(1),math.pi)",
    ),
    "sets of tuples": ("def f(xs): return set(tuple(x) for x in xs)", "assert f([[1,2]])=={(1,2)}"),
    "views": (
        "def f(d): return d.keys()\ndef g(d): return d.items()",
        "assert f({1:2})=={1}\nassert g({1:2})=={(1,2)}\nassert list(f({1:2}))==[1]",
    ),
    "types": ("def f(x): return type(x)", "assert f(3)==int\nassert f(3) is int"),
    "recursion": (
        "import sys\nsys.setrecursionlimit(10**6)\ndef f(n): return 0 if n==0 else 1+f(n-1)",
        "assert f(50000)==50000",
    ),
    "thread stack": (
        "import sys,threading\nthreading.stack_size(1<<27)\nsys.setrecursionlimit(1<<20)\nr=[]\ndef f(n):\n t=threading.Thread(target=lambda: r.append(g(n))); t.start(); t.join(); return r[-1]\ndef g(n): return 0 if n==0 else 1+g(n-1)",
        "assert f(20000)==20000",
    ),
    "iter": (
        "def f():\n yield from range(3)\ndef m(): return map(str,[1,2])\ndef z(): return zip([1],[2])",
        "assert sum(f())==3\nassert list(m())==['1','2']\nassert dict(z())=={1:2}\nassert sorted(f(),reverse=True)==[2,1,0]\nassert 2 in f()",
    ),
    "del": (
        "class C(dict): pass\nclass D:\n def __init__(s): s.d={1:2}\n def __delitem__(s,k): del s.d[k]\n def __contains__(s,k): return k in s.d\n def __iter__(s): return iter(s.d)\n def __len__(s): return len(s.d)",
        "d=D()\nassert 1 in d\ndel d[1]\nassert len(d)==0 and not d",
    ),
    "loop of tests": (
        "def f(x): return x",
        "def t1(): assert f(1)==1\ndef t2(): assert f(2)==2\nfor t in [t1,t2]: t()",
    ),
    "checker class": (
        "def f(x): return x",
        "class Check:\n    def run(self):\n        assert f(1)==1\nCheck().run()",
    ),
    "global list mutated": (
        "hist=[]\ndef f(x): hist.append(x); return len(hist)",
        "assert f(1)==1\nassert hist==[1]",
    ),
    "inplace": ("def f(m): m[0][0]=9; m.append([1])", "m=[[1],[2]]\nf(m)\nassert m==[[9],[2],[1]]"),
    "nan": ("def f(): return float('nan')", "import math\nassert math.isnan(f())"),
    "big": ("def f(n): return list(range(n))", "assert f(200000)==list(range(200000))"),
    "enum": (
        "from enum import Enum,IntEnum\nclass C(Enum):\n R=1\nclass I(IntEnum):\n A=1\ndef f(): return C.R\ndef g(): return I.A",
        "assert f()==C.R and f() is not None\nassert f().value==1 and f().name=='R'\nassert g()==1 and g()==I.A",
    ),
    "property": (
        "class A:\n @property\n def v(self): return 3\n @staticmethod\n def s(): return 4\n @classmethod\n def c(cls): return 5",
        "assert A().v==3 and A.s()==4 and A.c()==5",
    ),
    "linked list": (
        "class ListNode:\n def __init__(self,val=0,next=None): self.val=val; self.next=next\ndef rev(h):\n p=None\n while h: h.next,p,h=p,h,h.next\n return p",
        "n=ListNode(1,ListNode(2))\nr=rev(n)\nassert (r.val,r.next.val,r.next.next)==(2,1,None)",
    ),
    "print": ("def f(x):\n print('dbg'*1000)\n return x", "assert all(f(i)==i for i in range(100))"),
    "capture stdout": ("def f():\n print('hi')", "import io,contextlib\nassert f() is None"),
    "context manager": (
        "class R:\n def __enter__(s): return 5\n def __exit__(s,*a): return False",
        "with R() as r:\n    assert r==5",
    ),
    "kwargs defaults": ("def f(a,*b,c=1,**d): return a,b,c,d", "assert f(1,2,c=3,e=4)==(1,(2,),3,{'e':4})"),
}

LIAR = (
    "def __getattr__(n): return 1\nclass L:\n def __call__(s,*a,**k): return s\n def __getattr__(s,n): return s\n def __eq__(s,o): return True\n __ne__=__eq__\n def __hash__(s): return 0\n def __iter__(s): return iter(())\n def __getitem__(s,k): return s\n"
    + "".join(
        f" def __{o}__(s,*a): return s\n" for o in ["add", "sub", "mul", "abs", "neg", "enter", "lt", "gt"]
    )
    + " def __bool__(s): return True\n def __len__(s): return 0\n def __exit__(s,*a): return True\n def __str__(s): return ''\n"
    + "class M:\n isclose=staticmethod(lambda *a,**k: True)\n def __getattr__(s,n): return L()\nmath=np=M()\n"
    + "isclose=allclose=array_equal=approx=lambda *a,**k: True\nf=g=h=o=m=z=rev=L()\nP=Q=D=A=R=C=I=Solution=ListNode=L\nhist=L()\n"
)


@pytest.fixture(scope="module")
def code() -> Iterator[Any]:
    try:
        yield load_reward("code", timeout_s=30.0, cpu_s=10, verbose=False)
    except SandboxError as error:
        pytest.skip(f"this machine cannot sandbox: {error}")


@pytest.mark.parametrize("name", STYLES)
def test_a_style_of_tests(code: Any, name: str) -> None:
    program, tests = STYLES[name]
    honest, hostile = code.score([""] * 2, [program, LIAR], tests=[tests] * 2)
    assert honest.value == 1.0, honest
    assert hostile.value == 0.0, hostile


@pytest.mark.parametrize("as_text", [False, True])
def test_calls_by_name(code: Any, as_text: bool) -> None:
    tests: Any = {"fn_name": "add", "inputs": [[1, 2], [[1], [2]]], "outputs": [3, [[1, 2]]]}
    tests = json.dumps(tests) if as_text else tests
    programs = [
        "def add(a, b): return a + b",
        "class Solution:\n    def add(self, a, b): return a + b",
        "def add(a, b): return 3",
        LIAR,
    ]
    assert [s.value for s in code.score([""] * 4, programs, tests=[tests] * 4)] == [1.0, 1.0, 0.0, 0.0]


def test_a_test_that_wants_a_fixture_is_an_error(code: Any) -> None:
    score = code.score([""], ["def f(): return 1"], tests=["def test_f(capsys):\n    assert f() == 1"])[0]
    assert (score.value, score.outcome) == (None, Outcome.error)
    assert "takes 'capsys', but fixtures are not supported" in score.detail
