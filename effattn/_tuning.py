"""Choices that a machine decides: what was measured on it, else what the package ships.

A choice (the work from which our attention is faster than torch's, the tokens of a chunk, the shape of a tile) is declared
once, with every value that each of its features may take. A feature is a dtype or a class of sizes, never a size itself, so
the keys of the file are bounded by construction. ``python -m effattn tune`` measures and writes; a call only ever reads, once
a process.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import _files, _native
from ._tuning_defaults import TILES, shipped
from ._version import __version__

FORMAT = 1  # of the file; another one has another name, so that two versions of effattn can share a home
INTERPRETER = "Triton's interpreter"

_logger = logging.getLogger("effattn")


class Choice(NamedTuple):
    name: str  # family.what
    version: int  # of what its values mean: a raised one forgets what was measured
    about: str
    fields: dict[str, tuple]  # feature -> every value that it may take
    is_valid: Callable[[Any], bool]  # of a value from the file
    place: str = "cpu"  # what the measurement is of: "cpu", with so many threads, or "gpu"


class Found(NamedTuple):
    value: Any  # None: the launcher's own table
    origin: str  # "default" or "tuned <date>"


CHOICES: dict[str, Choice] = {}
_trial: dict[str, dict] = {}


def declare(choice: Choice) -> str:
    """Enter a choice; its name, by which it is found."""
    CHOICES[choice.name] = choice
    return choice.name


def choices(place: str = "") -> list[Choice]:
    return [choice for choice in CHOICES.values() if place in ("", choice.place)]


def find(name: str, *features) -> Found:
    """What is in force on this CPU with torch's number of threads."""
    return found(name, torch.get_num_threads(), features)


def value(name: str, *features):
    return found(name, torch.get_num_threads(), features).value


value._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, which would import all of Dynamo


def find_on(device: torch.device, name: str, *features) -> Found:
    """What is in force on the GPU that ``device`` names; elsewhere Triton's interpreter is meant."""
    index = None
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
    return found(name, gpu(index), features)


def tiles() -> str:
    """Where the tiles of Triton kernels on this GPU come from, in words."""
    place = gpu(torch.cuda.current_device() if torch.cuda.is_available() else None)
    count = 0 if is_ignored() else sum(_is_of(name, {place}, __version__) for name in _entries())
    default = f"tiles: {TILES}"
    return f"{default}; {count} tuned on this GPU" if count else f"{default} (default)"


def summary() -> str:
    """In one line, what ``info`` says of this machine's choices."""
    if is_ignored():
        return "shipped defaults: EFFATTN_TUNING=0"
    machines = {cpu(), *(gpu(index) for index in range(torch.cuda.device_count()))}
    here = {name: entry for name, entry in _entries().items() if _is_of(name, machines, __version__)}
    if not here:
        return "shipped defaults (python -m effattn tune measures)"
    return f"{len(here)} choices measured here, last on {max(e['measured'] for e in here.values())}, in {path()}"


def _is_of(name: str, machines: set[str], version: str | None = None) -> bool:
    release, _, machine, *_ = *name.split("; "), "", "", ""
    return machine in machines and version in (None, release.removeprefix("effattn "))


def power_of_two(number, least: int, most: int) -> int:
    """The power of two in [least, most] that is at least ``number``, or ``most``.

    By comparisons, which a traced graph turns into a guard on the class and not on the number.
    """
    size = least
    while size < most and number > size:
        size *= 2
    return size


def path() -> Path:
    directory = os.environ.get("EFFATTN_CACHE_DIR")
    return (Path(directory) if directory else Path.home() / ".cache" / "effattn") / f"tuning-{FORMAT}.json"


def is_ignored() -> bool:
    return os.environ.get("EFFATTN_TUNING") == "0"


def key(name: str, place: int | str, features: tuple) -> str:
    """What an entry of the file holds for. ``place``: threads of this CPU, or the name of a GPU."""
    choice = CHOICES[name]
    if len(features) != len(choice.fields):
        raise ValueError(f"{name}: features must be {', '.join(choice.fields) or 'none'}, got {features}")
    parts = [f"effattn {__version__}", f"{name} {choice.version}"]
    parts += [cpu(), f"{place} threads"] if isinstance(place, int) else [place]
    for (field, allowed), feature in zip(choice.fields.items(), features):
        if feature not in allowed:
            raise ValueError(f"{name}: {field} must be one of {allowed}, got {feature!r}")
        parts.append(f"{field} {str(feature).removeprefix('torch.')}")
    return "; ".join(parts)


@functools.cache
def cpu() -> str:
    isa = _native.isa() if _native.loaded else "no kernels"
    return f"{_cpu_model()}, {isa}"


@functools.cache
def gpu(index: int | None) -> str:
    if index is None:
        return INTERPRETER
    properties = torch.cuda.get_device_properties(index)
    chip = properties.gcnArchName if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return f"{properties.name}, {chip}"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip().replace(";", ",")
    except OSError:
        pass
    return platform.processor() or platform.machine()


# ---- what is in force ----


@functools.cache
def found(name: str, place: int | str, features: tuple) -> Found:
    choice, wanted = CHOICES[name], key(name, place, features)
    entry = _trial.get(wanted) or ({} if is_ignored() else _entries().get(wanted))
    if entry:
        tuned = _restored(entry["value"])
        if choice.is_valid(tuned):
            return Found(tuned, f"tuned {entry['measured']}")
        _logger.info("%s: %s has no use for %r, using the default", path(), wanted, tuned)
    return Found(_default(choice, features), "default")


def _default(choice: Choice, features: tuple):
    if choice.place == "gpu":
        return None
    rows = shipped(choice.name, _native.isa() if _native.loaded else "")
    for feature, allowed in zip(features, choice.fields.values()):
        rows = rows[allowed.index(feature)]
    return rows


def _restored(value):
    """JSON knows no tuples."""
    return tuple(value) if isinstance(value, list) else value


def forget() -> None:
    """Read the file again at the next call."""
    found.cache_clear()
    _entries.cache_clear()


@contextlib.contextmanager
def pretend(values: dict[str, Any]) -> Iterator[None]:
    """In this process, let the file hold ``values`` (key -> value) too."""
    _trial.update({name: {"value": value, "measured": "on trial"} for name, value in values.items()})
    found.cache_clear()
    try:
        yield
    finally:
        for name in values:
            del _trial[name]
        found.cache_clear()


# ---- the file ----


@functools.cache
def _entries() -> dict[str, dict]:
    """What the file holds; a file that is none of ours counts as none."""
    try:
        text = path().read_text()
    except FileNotFoundError:
        return {}
    except (OSError, RuntimeError, UnicodeDecodeError) as error:  # RuntimeError: there is no home
        _logger.info("the tuned choices are not readable, using the defaults: %s", error)
        return {}
    try:
        entries = parse(text)
    except ValueError as error:
        _logger.info("%s is ignored, using the defaults: %s", path(), error)
        return {}
    _log_unserved(entries)
    return entries


def _log_unserved(entries: dict) -> None:
    threads = torch.get_num_threads()
    here = [cpu(), f"{threads} threads"]
    if entries and not any(
        name.startswith(f"effattn {__version__}; ") and name.split("; ")[2:4] == here for name in entries
    ):
        _logger.info(
            "%s has nothing for effattn %s on %s with %d threads: using the defaults; `python -m effattn tune` measures",
            *(path(), __version__, cpu(), threads),
        )


def parse(text: str) -> dict[str, dict]:
    """The entries in ``text``: key -> {"value", "measured"}.

    Raises:
        ValueError: it is no file of this format.
    """
    content = json.loads(text)
    if not isinstance(content, dict) or not isinstance(content.get("entries"), dict):
        raise ValueError("it does not hold entries of tuned choices")
    if content.get("format") != FORMAT:
        raise ValueError(f"its format is {content.get('format')!r}, and this version reads {FORMAT}")
    for name, entry in content["entries"].items():
        if not isinstance(entry, dict) or "value" not in entry or not isinstance(entry.get("measured"), str):
            raise ValueError(f"{name!r} does not hold a value and when it was measured")
    return content["entries"]


def keep(values: dict[str, Any]) -> None:
    """Write values (key -> value) to the file, beside what it holds of other machines, threads and versions.

    Raises:
        OSError: the file cannot be written; the message names it.
    """
    import datetime

    today = datetime.date.today().isoformat()
    _rewrite(lambda entries: entries | {name: {"value": value, "measured": today} for name, value in values.items()})


def clear() -> int:
    """Remove this machine's entries, of any version and number of threads; how many there were."""
    machines = {cpu(), *(gpu(index) for index in range(torch.cuda.device_count()))}
    removed = []

    def without(entries):
        removed.extend(name for name in entries if _is_of(name, machines))
        return {name: entry for name, entry in entries.items() if name not in removed}

    if path().exists():
        _rewrite(without)
    return len(removed)


def _rewrite(change: Callable[[dict], dict]) -> None:
    to = path()
    to.parent.mkdir(parents=True, exist_ok=True)
    with _locked(to.with_suffix(".lock")):
        try:
            entries = parse(to.read_text())
        except (FileNotFoundError, ValueError):  # UnicodeDecodeError is a ValueError
            entries = {}
        _write(to, {"format": FORMAT, "entries": dict(sorted(change(entries).items()))})
    forget()


@contextlib.contextmanager
def _locked(lock: Path) -> Iterator[None]:
    """One writer at a time where the system can tell; elsewhere the last of two wins, and the file is whole all the same."""
    with lock.open("a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass
        yield


def _write(to: Path, content: dict) -> None:
    _files.write_atomically(to, lambda name: Path(name).write_text(json.dumps(content, indent=2) + "\n"))
