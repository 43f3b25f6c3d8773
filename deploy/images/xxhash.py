# ruff: noqa: INP001  # it lies in no package: the image has it beside the transfer package
"""Stands before an engine's packages under PYTHONPATH: its own xxhash, else the copy in fallback/.

What lies there goes before everything the engine has. An engine with an xxhash keeps the one it was built and
tested with; only where there is none does the transfer package get ours.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_ENGINES = [entry for entry in sys.path if Path(entry or ".").resolve() != _HERE]

_spec = PathFinder.find_spec(__name__, _ENGINES) or PathFinder.find_spec(__name__, [str(_HERE / "fallback")])
if _spec is None or _spec.loader is None:
    raise ModuleNotFoundError(
        f"the engine has no xxhash, and {_HERE / 'fallback'} has none for Python "
        f"{sys.version_info[0]}.{sys.version_info[1]}; install xxhash in the engine's image",
        name=__name__,
    )
# The import system returns what stands here when this module has run.
sys.modules[__name__] = module_from_spec(_spec)
_spec.loader.exec_module(sys.modules[__name__])
