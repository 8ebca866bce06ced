"""Datasets in, prompts and groups out."""

from rft.data.config import DataConfig, SourceClass
from rft.data.errors import DataError
from rft.data.prompts import PromptSet, load_prompts
from rft.data.rows import Rows, load_rows
from rft.data.sampler import Sampler

__all__ = [
    "DataConfig",
    "DataError",
    "PromptSet",
    "Rows",
    "Sampler",
    "SourceClass",
    "load_prompts",
    "load_rows",
]
