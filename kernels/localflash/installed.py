"""Which optional packages are there, without importing any."""

from importlib.machinery import PathFinder
from importlib.util import find_spec


def installed(modules: tuple[str, ...]) -> str | None:
    """The first of these modules that is there to import; imports none, nor their parents."""
    return next((name for name in modules if _is_there(name)), None)


def _is_there(module: str) -> bool:
    parent, _, child = module.rpartition(".")
    if not parent:
        return find_spec(child) is not None
    # find_spec(module) would import the parent: for flash_attn possibly all of FlashAttention-2
    spec = find_spec(parent)
    return (
        spec is not None
        and PathFinder.find_spec(module, spec.submodule_search_locations) is not None
    )
