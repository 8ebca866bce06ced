"""rft: reinforcement fine-tuning and preference alignment of language models."""

__version__ = "0.1.0"
