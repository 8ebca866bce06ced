r"""Normalise the notation of an answer: Unicode, LaTeX, Markdown and typographic spaces to plain LaTeX.

`plain_tex` changes the notation of an answer, never its meaning: `½`, `\dfrac12` and `\tfrac{1}{2}` all
become a `\frac`; `x²` becomes `x^{2}`; `≤`, `\leqslant` and `<=` become `\le`; `1\,234` and `1{,}234`
become `1234` and `1,234`; `\mathbf{(D)}` becomes `(D)`.
"""

from __future__ import annotations

import re
import unicodedata


def words_of(text: str) -> list[str]:
    """Split a table that is written as text into words."""
    return text.split()


FUNCTIONS = frozenset(
    words_of(
        "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh coth "
        "arcsinh arccosh arctanh asin acos atan ln log lg exp sqrt cis"
    )
)
GREEK = frozenset(
    words_of(
        "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi "
        "rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi "
        "Omega"
    )
)
CURRENCIES = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee", "¢": "cent"}

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱˣ", "0123456789+-=()nix")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₙₓ", "0123456789+-=()nx")
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱˣ]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₙₓ]+")
_VULGAR = re.compile("[¼-¾⅐-⅞↉]")
_SPECIAL = {
    **dict.fromkeys("−–—‒‐‑﹣－", "-"),
    **dict.fromkeys("×✕✖⨯", r"\times "),
    **dict.fromkeys("·⋅∙•⋆", r"\cdot "),
    **dict.fromkeys("∕⁄／", "/"),
    **dict.fromkeys("’‘′ʹ", "'"),
    **dict.fromkeys("“”″", '"'),
    **dict.fromkeys("≤⩽≦", r"\le "),
    **dict.fromkeys("≥⩾≧", r"\ge "),
    **dict.fromkeys("≈≃≅", r"\approx "),
    **dict.fromkeys("∅⌀Ø", r"\emptyset "),
    **dict.fromkeys("∣｜", "|"),
    **dict.fromkeys("⟨〈", r"\langle "),
    **dict.fromkeys("⟩〉", r"\rangle "),
    **dict.fromkeys("°º˚", r"\degree "),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad\u200e\u200f", ""),
    "÷": r"\div ",
    "≠": r"\ne ",
    "≡": r"\equiv ",
    "∈": r"\in ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∖": r"\setminus ",
    "∞": r"\infty ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "…": "...",
    "⋯": "...",
    "⌊": r"\lfloor ",
    "⌋": r"\rfloor ",
    "⌈": r"\lceil ",
    "⌉": r"\rceil ",
    "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}",
    "ℚ": r"\mathbb{Q}",
    "ℂ": r"\mathbb{C}",
    "∨": " or ",
    "∧": " and ",
    "∛": r"\sqrt[3]",
    "∜": r"\sqrt[4]",
    "℃": r"\degree C",
    "℉": r"\degree F",
    "，": ",",
    "∶": ":",
    "µ": r"\mu ",
}
_GREEK_LETTERS = {
    char: rf"\{name} "
    for char, name in zip(
        "αβγδεζηθικλμνξρστυφχψωΓΔΘΛΞΣΦΨΩϕϵϑ",
        words_of(
            "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau "
            "upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega phi epsilon "
            "theta"
        ),
        strict=True,
    )
} | {"π": r"\pi ", "Π": r"\Pi "}
_UNICODE = str.maketrans(
    {**_SPECIAL, **_GREEK_LETTERS, **{c: rf"\{n} " for c, n in CURRENCIES.items() if c != "$"}}
)
_OVERLINED = re.compile("(?:[0-9]\u0305)+")
_ROOT = re.compile(r"√\s*(\d+(?:\.\d+)?|[a-zA-Z]|\\pi|\\[a-z]+)?")

_GROUPED = re.compile(r"(?<=\d)(?:\\[,;:!]\s*|\\ |~|\\thinspace\s*|\u2009)(?=\d{3}(?!\d))")
_BRACED_GROUP = re.compile(r"(?<=\d)\{,\}(?:\\!)?(?=\d{3}(?!\d))")
_LINE_END = re.compile(r"\\\\(?:\[[^\]]*\])?")
_BRACED_POINT = re.compile(r"(?<=\d)\{,\}(?=\d)")
_SPACING = re.compile(
    r"(?<!\\)\\[,;: ]"
    r"|\\(?:q?quad|displaystyle|textstyle|scriptstyle|limits|nolimits|thinspace|enspace)(?![a-zA-Z])"
    r"|~|\\[hv]space\*?\{[^{}]*\}|\\h?phantom\{[^{}]*\}|\\(?:text)?color\{\w*\}"
)
_WIDE = re.compile(r"\\qq?uad(?![a-zA-Z])")
_RELATED = re.compile(r"[=<>]|\\(?:le|ge|ne|leq|geq|neq|leqslant|geqslant|lt|gt)(?![a-zA-Z])")
_JOINED_BEFORE = re.compile(r"^\s*(?:[,;.&]|\\?(?:and|or|text|lor|land|vee|wedge|mbox)(?![a-zA-Z]))")
_JOINED_AFTER = re.compile(r"(?:[,;&({\[|:]|\b(?:and|or)\s*\}?|\})\s*$")
_SIZES = re.compile(r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])\s*(\.)?")
_FRACS = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_BINOMS = re.compile(r"\\[dt]binom(?![a-zA-Z])")
_DEGREES = re.compile(
    r"\^\s*\{?\s*\\(?:circ|degree)(?![a-zA-Z])\s*\}?|\\degrees?(?![a-zA-Z])|\\textdegree(?![a-zA-Z])"
)
_COMMANDS = {
    "leq": r"\le ",
    "leqslant": r"\le ",
    "leqq": r"\le ",
    "geq": r"\ge ",
    "geqslant": r"\ge ",
    "geqq": r"\ge ",
    "neq": r"\ne ",
    "lt": "<",
    "gt": ">",
    "lvert": "|",
    "rvert": "|",
    "vert": "|",
    "lbrace": r"\{",
    "rbrace": r"\}",
    "lbrack": "[",
    "rbrack": "]",
    "colon": ":",
    "lor": " or ",
    "vee": " or ",
    "land": " and ",
    "wedge": " and ",
    "varnothing": r"\emptyset ",
    "dots": "...",
    "ldots": "...",
    "cdots": "...",
    "dotsc": "...",
    "dotsb": "...",
    "ast": "*",
    "approxeq": r"\approx ",
    "simeq": r"\approx ",
    "mid": "|",
    "top": "T",
    "intercal": "T",
    "euro": r"\euro ",
    "pounds": r"\pound ",
    "textdollar": r"\dollar ",
    "inf": r"\infty ",
    "infin": r"\infty ",
    "smallsetminus": r"\setminus ",
    "backslash": r"\setminus ",
    "lg": r"\log ",
    "asin": r"\arcsin ",
    "acos": r"\arccos ",
    "atan": r"\arctan ",
    "R": r"\mathbb{R}",
    "Z": r"\mathbb{Z}",
    "reals": r"\mathbb{R}",
    "mathstrut": "",
    "strut": "",
    "hfill": "",
    "null": "",
}
_COMMAND = re.compile(r"\\([a-zA-Z]+)")
_STYLED = re.compile(
    r"\\(text|mbox|hbox|mathrm|textbf|mathbf|operatorname\*?|textit|textrm|textsf|texttt|textnormal|mathit|mathsf|"
    r"boldsymbol|bm|emph|underline|textup|mathop|pmb|rm|bf|it|mathnormal)(?![a-zA-Z])\s*(?:\{([^{}]*)\}|(?<=[fm])\s*([a-zA-Z0-9]))"
)
_BLACKBOARD = re.compile(r"\\mathbb\s*\{?\s*([A-Z])\s*\}?|\\mathbf\s*\{R\}")
_JOINER = re.compile(r"^\s*(?:and|or)\s*$", re.IGNORECASE)
_SUP = re.compile(r"<sup>(.*?)</sup>", re.IGNORECASE)
_SUB = re.compile(r"<sub>(.*?)</sub>", re.IGNORECASE)


def plain_tex(text: str) -> str:
    """Write an answer as plain LaTeX, on one line, without math delimiters and final punctuation."""
    text = _undelimited(text.strip())
    if not text.isascii():
        text = _from_unicode(text)
    if text.isalnum():
        return text
    text = _from_markup(text)
    text = _currency(text)
    if "\\" in text or "{" in text or "~" in text:
        text = _from_tex(text)
    if "<" in text or ">" in text or "!" in text or "=" in text:
        for written, tex in (("<=", r"\le "), (">=", r"\ge "), ("!=", r"\ne "), ("==", "="), (":=", "=")):
            text = text.replace(written, tex)
    text = " ".join(text.split())
    while text and text[-1] in ".,;" and not text.endswith("..."):
        text = text[:-1].rstrip()
    return text


def _undelimited(text: str) -> str:
    for opening, closing in (("**", "**"), ("$$", "$$"), (r"\(", r"\)"), (r"\[", r"\]"), ("`", "`")):
        while len(text) > 4 and text.startswith(opening) and text.rstrip(".").endswith(closing):
            inner = text.rstrip(".")[len(opening) : -len(closing)]
            if opening in inner:
                break
            text = inner.strip()
    return text


def _from_unicode(text: str) -> str:
    text = _RAISED.sub(lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
    text = _LOWERED.sub(lambda m: "_{" + m[0].translate(_SUBSCRIPTS) + "}", text)
    text = _VULGAR.sub(_vulgar, text)
    text = _OVERLINED.sub(lambda m: r"\overline{" + m[0].replace("\u0305", "") + "}", text)
    text = text.replace("\u2009", r"\,").replace("\u202f", r"\,").translate(_UNICODE)
    text = unicodedata.normalize("NFKC", text).translate(_UNICODE)  # full width, mathematical letters
    if "√" in text:
        text = _ROOT.sub(lambda m: rf"\sqrt{{{m[1]}}}" if m[1] else r"\sqrt", text)
    return text


def _vulgar(match: re.Match[str]) -> str:
    top, _, bottom = unicodedata.normalize("NFKC", match[0]).partition("\u2044")
    return rf"\frac{{{top}}}{{{bottom}}}"


def _from_markup(text: str) -> str:
    if "<su" in text.lower():
        text = _SUB.sub(r"_{\1}", _SUP.sub(r"^{\1}", text))
    if "**" in text:
        text = text.strip("*") if text.startswith("**") else text
        text = text.replace("**", "^")
    return text


def _currency(text: str) -> str:
    r"""Write `\$5` and a single `$5` as `\dollar 5`; remove dollars that delimit math."""
    if "$" not in text:
        return text
    text = text.replace(r"\$", r"\dollar ")
    if text.count("$") % 2:
        text = re.sub(r"\$(?=\s*[\d.])", r"\\dollar ", text, count=1)
    return text.replace("$", " ").strip()


def _from_tex(text: str) -> str:
    text = _GROUPED.sub("", text)
    if "{,}" in text:
        text = _BRACED_POINT.sub(".", _BRACED_GROUP.sub(",", text))
    text = text.replace("{.}", ".").replace("{:}", ":").replace("{=}", "=").replace("{-}", "-")
    if r"\\" in text and r"\begin" not in text:
        text = _LINE_END.sub(", ", text)
    text = re.sub(r"(?<!\\)\\!\s*", "", text)
    if "quad" in text and r"\begin" not in text:
        text = _listed_relations(text)
    text = _SPACING.sub(" ", text)
    text = _SIZES.sub("", text)
    text = _BINOMS.sub(r"\\binom", _FRACS.sub(r"\\frac", text))
    text = _DEGREES.sub(r"\\degree ", text)
    text = text.replace(r"\%", "%").replace(r"\&", "&").replace(r"\#", "#") if "\\begin" not in text else text
    text = _COMMAND.sub(lambda m: _COMMANDS.get(m[1], m[0]), text)
    text = _BLACKBOARD.sub(lambda m: rf"\mathbb{{{m[1] or 'R'}}}", text)
    for _ in range(4):  # nested styles
        shorter = _STYLED.sub(_unstyled, text)
        if shorter == text:
            break
        text = shorter
    return text


def _listed_relations(text: str) -> str:
    r"""Replace the space in `x = 1 \quad y = 2` by a comma."""
    first, *rest = _WIDE.split(text)
    for part in rest:
        both = _RELATED.search(first) and _RELATED.search(part)
        joined = _JOINED_AFTER.search(first) or _JOINED_BEFORE.search(part)
        first += (", " if both and not joined else " ") + part
    return first


def _unstyled(match: re.Match[str]) -> str:
    """Return the content of a style command: math unchanged, words inside one `\\text`."""
    content = match[2] if match[2] is not None else match[3] or ""
    bare = content.strip()
    if bare in FUNCTIONS or bare in ("lcm", "gcd", "mod"):
        return rf"\{bare} "
    if _JOINER.match(content):
        return f" {bare.lower()} "
    if len(bare) == 1 and bare.isalpha() and match[1] not in ("text", "mbox", "hbox", "textrm"):
        return f" {bare} "
    if any(c.isalpha() for c in bare) and not any(c.isdigit() or c in "()\\|=<>{}," for c in bare):
        return rf"\words{{{content}}}"
    return f" {content} "
