"""A progress bar on stderr: tqdm's where it is installed, else one line that rewrites itself."""

from __future__ import annotations

import sys
import time


class Progress:
    """Counts rows; the description says which contender is being prepared or that the row is being timed."""

    def __init__(self, total: int):
        self.total, self.done, self.name = total, 0, ""
        self.started = time.monotonic()
        self.bar = None

    def __enter__(self) -> Progress:
        try:
            from tqdm import tqdm
        except ImportError:
            return self
        layout = "{percentage:3.0f}%|{bar:20}| {n}/{total} [{elapsed}<{remaining}] {desc}"
        self.bar = tqdm(total=self.total, file=sys.stderr, bar_format=layout, leave=False, dynamic_ncols=True)
        return self

    def __exit__(self, *exception) -> None:
        if self.bar is not None:
            self.bar.close()
        elif sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def row(self, name: str) -> None:
        self.name = name
        self._show("")

    def step(self, contender: str) -> None:
        """``contender`` is being prepared; "" while a round of timing goes on."""
        self._show(f"preparing {contender}" if contender else "timing")

    def row_done(self) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.update(1)
        elif not sys.stderr.isatty():
            print(f"{self.done}/{self.total} {self.name}", file=sys.stderr, flush=True)

    def _show(self, what: str) -> None:
        text = f"{self.name} {what}".rstrip()
        if self.bar is not None:
            self.bar.set_description_str(text, refresh=what != "timing")
        elif sys.stderr.isatty():
            share = self.done / max(1, self.total)
            bar = "#" * int(20 * share) + "." * (20 - int(20 * share))
            seconds = time.monotonic() - self.started
            print(
                f"\r\033[K[{bar}] {self.done}/{self.total} {seconds:.0f} s {text}", end="", file=sys.stderr, flush=True
            )
