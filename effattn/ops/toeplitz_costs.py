"""What the methods of Toeplitz-weighted attention cost on this machine, in nanoseconds a unit with torch's threads busy.

``python -m effattn tune`` measures once and keeps the result; a call only ever reads it.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import platform
import tempfile
import time
from pathlib import Path

import torch

from .. import _native
from .._version import __version__

DEFAULTS = (0.0105, 0.053, 0.091, 0.052)
"""direct_ns, fft_ns, double_fft_ns, scan_ns of ``toeplitz_methods.plan``, measured on two cores of an AMD EPYC (Zen 4)."""

NAMES = ("direct_ns", "fft_ns", "double_fft_ns", "scan_ns")

_logger = logging.getLogger("effattn")


def costs() -> tuple[float, float, float, float]:
    """Measured for this machine and torch's number of threads, else DEFAULTS. The file is read once a process."""
    return _costs_of(torch.get_num_threads())


costs._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, which would import all of Dynamo


def path() -> Path:
    directory = os.environ.get("EFFATTN_CACHE_DIR")
    return (Path(directory) if directory else Path.home() / ".cache" / "effattn") / "toeplitz.json"


def key(threads: int) -> str:
    """What a measurement holds for."""
    isa = _native.isa() if _native.loaded else "no kernels"
    return f"effattn {__version__}, {_cpu_model()}, {isa}, {threads} threads"


def measure() -> tuple[float, float, float, float]:
    """Time every method (seconds), keep the result for later processes and return it.

    Raises:
        OSError: the file cannot be written; the message names it.
    """
    found = _measured()
    entries = {name: values for name, values in _entries().items() if _is_of_this_version(name)}
    entries[key(torch.get_num_threads())] = dict(zip(NAMES, found))
    _write(path(), entries)
    forget()
    return found


def forget() -> None:
    """Read the file again at the next call."""
    _costs_of.cache_clear()
    _entries.cache_clear()


def crossover(values: tuple[float, ...], features: int = 32, value_dim: int = 64) -> int | None:
    """Tokens from which the float32 FFT is predicted to be faster than the direct method; None: not below 2^24."""
    from .toeplitz_methods import predicted

    low, high = 1, 1 << 24

    def is_faster(tokens: int) -> bool:
        direct, fft, *_ = predicted(values, tokens, features, value_dim)
        return fft < direct

    if not is_faster(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_faster(middle) else (middle, high)
    return high


def tune() -> int:
    """``python -m effattn tune``."""
    if not _native.loaded:
        print(f"there is nothing to tune: {_native.problem}")
        return 1
    before = costs()
    try:
        after = measure()
    except OSError as error:
        print(f"measured, but not kept: {error}")
        return 1
    print(f"{key(torch.get_num_threads())}\nwritten to {path()}\n")
    print(f"{'':16}{'before':>10}{'now':>10}   nanoseconds a unit")
    for name, old, new in zip(NAMES, before, after):
        print(f"{name:16}{old:10.4f}{new:10.4f}")
    names = [f"N = {tokens}" if tokens else "no N" for tokens in map(crossover, (before, after))]
    print(f"\nthe FFT is faster than tiles from (M = 32, D = 64): {names[0]} before, {names[1]} now")
    return 0


# ---- the file ----


@functools.cache
def _costs_of(threads: int) -> tuple[float, float, float, float]:
    entries = _entries()
    name = key(threads)
    if name not in entries:
        if entries:
            _logger.info("%s has no costs for %s: using the defaults; `python -m effattn tune` measures", path(), name)
        return DEFAULTS
    return tuple(entries[name][cost] for cost in NAMES)


@functools.cache
def _entries() -> dict[str, dict[str, float]]:
    """What the file holds; a file that does not hold costs counts as none."""
    try:
        text = path().read_text()
    except FileNotFoundError:
        return {}
    except (OSError, RuntimeError, UnicodeDecodeError) as error:  # RuntimeError: there is no home
        _logger.info("costs of Toeplitz methods are not readable, using the defaults: %s", error)
        return {}
    try:
        return _parse(text)
    except ValueError as error:
        _logger.info("%s is ignored, using the defaults: %s", path(), error)
        return {}


def _parse(text: str) -> dict[str, dict[str, float]]:
    entries = json.loads(text)
    if not isinstance(entries, dict):
        raise ValueError("it does not hold an object")
    for name, values in entries.items():
        if not isinstance(values, dict) or set(values) != set(NAMES):
            raise ValueError(f"{name!r} does not hold {', '.join(NAMES)}")
        for cost, value in values.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise ValueError(f"{cost} of {name!r} must be a positive number, got {value!r}")
    return entries


def _is_of_this_version(name: str) -> bool:
    return name.startswith(f"effattn {__version__}, ")


def _write(to: Path, entries: dict) -> None:
    """All or nothing: another process reads the old file or the new one."""
    to.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=to.name, dir=to.parent)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(entries, file, indent=2)
            file.write("\n")
        os.replace(temporary, to)
    except BaseException:
        os.unlink(temporary)
        raise


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


# ---- measuring ----

SHAPES = {"direct": (2048, 32, 64), "fft": (4096, 32, 64), "double_fft": (4096, 32, 64), "structured": (4096, 32, 64)}
"""(N, M, D) of what is timed: milliseconds each, and tiles, transforms and states of the sizes that models use."""

REPEATS = 7


def _measured() -> tuple[float, float, float, float]:
    from .toeplitz_methods import predicted

    calls = [_call(method, *shape) for method, shape in SHAPES.items()]
    for call in calls:
        call()
    rounds = [[_seconds(call) for call in calls] for _ in range(REPEATS)]  # in turn, so that all see the same machine
    direct, fft, double_fft, structured = map(min, zip(*rounds))  # noise only adds
    heads = _heads()
    units = {method: predicted((1.0,) * 4, *shape, heads=heads) for method, shape in SHAPES.items()}
    direct_ns = direct / units["direct"][0]
    near = predicted((direct_ns, 1.0, 1.0, 0.0), *SHAPES["structured"], heads=heads)[3]
    scans = units["structured"][3] - predicted((1.0, 1.0, 1.0, 0.0), *SHAPES["structured"], heads=heads)[3]
    scan = max(structured - near, 0.1 * structured)  # noise must not make a scan free
    return direct_ns, fft / units["fft"][1], double_fft / units["double_fft"][2], scan / scans


def _heads() -> int:
    """So many that every thread has as much to do."""
    return max(2, torch.get_num_threads())


def _call(method: str, tokens: int, features: int, value_dim: int):
    from . import toeplitz_methods as methods
    from .toeplitz import toeplitz

    heads = _heads()
    generator = torch.Generator().manual_seed(0)
    query, key = torch.rand(2, 1, heads, tokens, features, generator=generator)
    value = torch.randn(1, heads, tokens, value_dim, generator=generator)
    bias = torch.zeros(heads, 2 * tokens - 1)
    code = methods.CODES[method]

    def call() -> None:
        with torch.no_grad():
            toeplitz("cpu", query, key, value, bias, None, 1, tokens, False, code, 0.0, False)

    return call


def _seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
