"""FLOP formulas for ``torch.utils.flop_counter``, registered when that module is imported.

It imports triton (0.4 s), so importing it from here would cost every user what only users of the counter need.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable

_MODULE = "torch.utils.flop_counter"
_pending: list[tuple[object, Callable]] = []


def register(packet, formula: Callable) -> None:
    """Count calls of the op ``packet`` as ``formula(*argument_shapes, out_shape=...)`` FLOPs."""
    if _MODULE in sys.modules:
        sys.modules[_MODULE].register_flop_formula(packet)(formula)
        return
    if not _pending:
        sys.meta_path.insert(0, _Finder())
    _pending.append((packet, formula))


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_register(module) -> None:
            execute(module)
            for packet, formula in _pending:
                module.register_flop_formula(packet)(formula)
            _pending.clear()

        spec.loader.exec_module = execute_and_register
        return spec
