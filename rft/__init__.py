"""rft: reinforcement fine-tuning and preference alignment of language models."""

import sys

if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:  # `python -m rft.cli` puts the working folder first,
    sys.path.append(sys.path.pop(0))  # where a `json.py` would stand for the real module

__version__ = "0.1.0"
