"""Datasets, and the prompts and groups made from them."""

from rft.data.errors import DataError
from rft.data.groups import GroupMaker, GroupSet
from rft.data.mixture import first_row, has_held_out, load_groups, load_prompts
from rft.data.prompts import PromptSet
from rft.data.rows import Rows, load_rows
from rft.data.sampler import GroupSampler, GroupSource, Sampler
from rft.data.stream import GroupStream

__all__ = [
    "DataError",
    "GroupMaker",
    "GroupSampler",
    "GroupSet",
    "GroupSource",
    "GroupStream",
    "PromptSet",
    "Rows",
    "Sampler",
    "first_row",
    "has_held_out",
    "load_groups",
    "load_prompts",
    "load_rows",
]
