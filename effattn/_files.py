"""What commands leave behind when they are interrupted: whole files and an exit status."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

INTERRUPTED = 130  # 128 + SIGINT, what shells report


def write_atomically(path: str | os.PathLike, write: Callable[[str], object]) -> None:
    """``write`` a file beside ``path`` and rename it: whoever interrupts finds the old file or the new one, no third."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Known before it exists, so that no moment is between making it and being bound to remove it.
    name = str(target.with_name(f".{target.stem}.{os.getpid()}.{os.urandom(4).hex()}{target.suffix}"))
    try:
        write(name)
        os.replace(name, target)
    finally:
        with contextlib.suppress(FileNotFoundError):  # renamed, or never made
            os.unlink(name)


def exit_status(main: Callable[[], int]) -> int:
    """What ``main`` returns; Ctrl-C is one line and a status, wherever it comes."""
    try:
        return main()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
