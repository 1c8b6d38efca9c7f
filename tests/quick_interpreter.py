"""Triton's interpreter without work that it repeats.

While a kernel is interpreted, the functions of triton.language are replaced. Triton looks all of them up again at every
call of a device function, finds them replaced, and so spends a third of its time.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect

import triton.language as tl
from triton.runtime import interpreter

ORIGINALS = {name: getattr(interpreter, name) for name in ("_patch_lang", "_patch_builtin", "_get_np_dtype")}
ORIGINAL_OPTIONS = interpreter.interpreter_builder.options


class _Launch:
    """What is replaced until the running launch is over."""

    def __init__(self):
        self.modules, self.scopes = set(), []

    def restore(self):
        self.modules.clear()
        while self.scopes:
            self.scopes.pop().restore()


_launch = _Launch()


@functools.cache
def _modules_seen_by(function):
    return {value.__name__ for value in function.__globals__.values() if value is tl or value is tl.core}


def _patch_once(function):
    seen = _modules_seen_by(function)
    if not seen <= _launch.modules:
        _launch.scopes.append(ORIGINALS["_patch_lang"](function))
        _launch.modules |= seen
    return _launch


@functools.cache
def _builtins(place):
    return [(name, member) for name, member in inspect.getmembers(place) if tl.core.is_builtin(member)]


def _patch_builtins(place, builder, scope):
    for name, member in _builtins(place):
        if getattr(place, name) is member:
            interpreter._patch_attr(place, name, member, builder, scope)


_dtypes = {}


def _known_dtype_of_numpy(dtype):
    if dtype.name not in _dtypes:
        _dtypes[dtype.name] = ORIGINALS["_get_np_dtype"](dtype)
    return _dtypes[dtype.name]


def install() -> None:
    if not hasattr(interpreter, "_LangPatchScope"):
        return  # an older Triton, which restores in another way
    if not ORIGINAL_OPTIONS.debug:  # then the interpreter looks for overflows and says nothing of them
        interpreter.interpreter_builder.options = dataclasses.replace(ORIGINAL_OPTIONS, sanitize_overflow=False)
    interpreter._patch_lang = _patch_once
    interpreter._patch_builtin = _patch_builtins
    interpreter._get_np_dtype = _known_dtype_of_numpy
