"""TRL's usual signature; the data has no such column."""


def by_truth(completions, ground_truth, **kwargs):
    return [float(t in c) for c, t in zip(completions, ground_truth, strict=True)]
