"""The KV that one rank owns: pages in slabs, shared by texts, within a budget."""

from ringstar.paging.pool import CacheFull, PagePool, Storage
from ringstar.paging.table import PageTable
from ringstar.paging.text import Needs, ShardedCache, State

__all__ = [
    "CacheFull",
    "Needs",
    "PagePool",
    "PageTable",
    "ShardedCache",
    "State",
    "Storage",
]
