"""Labelled pairs of final answers: (gold, answer, are they the same), by kind. Written for this project."""

from __future__ import annotations

SAME: dict[str, list[tuple[str, str]]] = {
    "numbers": [
        ("18", "18"),
        ("18", "18.0"),
        ("18", "+18"),
        ("1080", "1,080"),
        ("1,080", "1080.00"),
        ("0.5", ".5"),
        ("-3", "−3"),
        ("70000", "7 \\times 10^4"),
        ("0.000672", "6.72e-4"),
        ("10,\\!080", "10080"),
    ],
    "fractions": [
        ("\\frac{1}{2}", "\\frac12"),
        ("\\frac{1}{2}", "\\dfrac{1}{2}"),
        ("\\frac{1}{2}", "1/2"),
        ("\\frac{1}{2}", "0.5"),
        ("\\frac{14}{3}", "28/6"),
        ("-\\frac{3}{8}", "\\frac{-3}{8}"),
        ("1\\frac{4}{5}", "\\frac{9}{5}"),
        ("137 \\frac{1}{2}", "137.5"),
        ("\\frac 59", "5/9"),
    ],
    "percent and currency": [
        ("50\\%", "50"),
        ("50", "50%"),
        ("0.5", "50\\%"),
        ("\\$36", "36"),
        ("36", "$36"),
        ("\\$18.90", "18.9"),
        ("\\$32,\\!348", "32348"),
    ],
    "units and text": [
        ("5.4 \\text{ cents}", "5.4"),
        ("864 \\mbox{ inches}^2", "864"),
        ("90^\\circ", "90"),
        ("90", "90^{\\circ}"),
        ("18", "18 dollars"),
        ("5", "5 apples"),
        ("15\\mbox{ cm}^2", "15 \\text{ cm}^2"),
        ("15\\mbox{ cm}^2", "15"),
        ("\\text{Evelyn}", "Evelyn"),
        ("\\text{(C)}", "C"),
        ("\\text{east}", "East"),
    ],
    "tuples, lists and intervals": [
        ("(3, \\frac{\\pi}{2})", "\\left( 3, \\frac{\\pi}{2} \\right)"),
        ("(2,4)", "(2, 4.0)"),
        ("1,-2", "-2, 1"),
        ("3, 5, 7", "7, 5 and 3"),
        ("\\{1, 2\\}", "\\{2, 1\\}"),
        ("(3,4]", "\\left(3, 4\\right]"),
        ("(0,9) \\cup (9,36)", "(9, 36) \\cup (0, 9)"),
        ("(-\\infty, 2)", "(-\\infty,2)"),
        ("3 \\pm 2 \\sqrt{2}", "3 - 2\\sqrt{2}, 3 + 2\\sqrt{2}"),
        ("x \\in [-2,7]", "[-2, 7]"),
    ],
    "matrices": [
        (
            "\\begin{pmatrix} -1/3 \\\\ 2/3 \\end{pmatrix}",
            "\\begin{pmatrix} -\\frac{1}{3} \\\\ \\frac{2}{3} \\end{pmatrix}",
        ),
        (
            "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}",
            "\\begin{bmatrix} 1 & 2 \\\\ 3 & 4.0 \\end{bmatrix}",
        ),
    ],
    "expressions": [
        ("3\\sqrt{13}", "\\sqrt{117}"),
        ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt{3}}"),
        ("11\\sqrt2", "11 \\sqrt{2}"),
        ("2k+2", "2(k+1)"),
        ("(a+5)(b+2)", "ab + 2a + 5b + 10"),
        ("6r^2-4r-24", "-4r + 6r^2 - 24"),
        ("6 - 5i", "-5i + 6"),
        ("12\\pi", "12 \\cdot \\pi"),
        ("x^3+3x-6", "-6 + 3x + x^3"),
        ("18+2\\pi", "2\\pi + 18"),
        ("\\cot x", "\\frac{1}{\\tan x}"),
        ("p - q", "-q+p"),
    ],
    "equations": [
        ("x=5", "5"),
        ("5", "x = 5"),
        ("y = 2x + 3", "2x+3"),
        ("y = 2x + 3", "y = 3 + 2x"),
        ("5x - 7y + 11z + 4 = 0", "5x - 7y + 11z = -4"),
        ("5x - 7y + 11z + 4 = 0", "10x - 14y + 22z + 8 = 0"),
    ],
    "bases": [("52_8", "52_{8}"), ("4210_{5}", "4210_5"), ("52_8", "52")],
}

DIFFERENT: dict[str, list[tuple[str, str]]] = {
    "numbers": [
        ("18", "19"),
        ("18", "-18"),
        ("1080", "1,081"),
        ("0.5", "0.51"),
        ("100000000", "100000001"),
        ("10", "10.5"),
        ("0", "1"),
    ],
    "fractions": [
        ("\\frac{1}{2}", "\\frac{2}{1}"),
        ("\\frac{1}{3}", "0.3"),
        ("\\frac{9}{5}", "1\\frac{3}{5}"),
    ],
    "percent and currency": [("50\\%", "5"), ("\\$36", "37")],
    "units and text": [
        ("5.4 \\text{ cents}", "5.4 \\text{ dollars}"),
        ("90^\\circ", "80^\\circ"),
        ("15\\mbox{ cm}^2", "15\\mbox{ cm}^3"),
        ("\\text{Evelyn}", "Carla"),
        ("\\text{(C)}", "B"),
        ("\\text{east}", "west"),
        ("\\text{even}", "odd"),
        ("12", "\\text{twelve cats}"),
    ],
    "tuples, lists and intervals": [
        ("(2,4)", "(4,2)"),
        ("(3, \\frac{\\pi}{2})", "(\\frac{\\pi}{2}, 3)"),
        ("1,-2", "1,2"),
        ("1,-2", "1"),
        ("(3,4]", "[3,4)"),
        ("(3,4]", "(3,4)"),
        ("(0,9) \\cup (9,36)", "(0,36)"),
        ("(-\\infty, 2)", "(2, \\infty)"),
        ("\\{1, 2\\}", "\\{1, 3\\}"),
        ("3", "3, 4"),
        ("(1,234)", "1234"),
    ],
    "matrices": [
        ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 2 \\\\ 1 \\end{pmatrix}"),
        ("\\begin{pmatrix} 1 & 2 \\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
    ],
    "expressions": [
        ("3\\sqrt{13}", "3\\sqrt{14}"),
        ("2k+2", "2k+1"),
        ("6 - 5i", "6 + 5i"),
        ("12\\pi", "12"),
        ("x^3+3x-6", "x^3+3x+6"),
        ("p - q", "q - p"),
        ("\\sqrt{51}", "51"),
        ("\\cot x", "\\tan x"),
    ],
    "equations": [
        ("x=5", "x=6"),
        ("y = 2x + 3", "y = 2x - 3"),
        ("5x - 7y + 11z + 4 = 0", "5x - 7y + 11z - 4 = 0"),
    ],
    "bases": [("52_8", "53_8"), ("52_8", "52_9")],
}

CASES = [
    (kind, gold, answer, same)
    for table, same in ((SAME, True), (DIFFERENT, False))
    for kind, pairs in table.items()
    for gold, answer in pairs
]
