"""Empties its input list."""


def pops(completions, **kwargs):
    out = []
    while completions:
        out.append(float(len(completions.pop())))
    return out
