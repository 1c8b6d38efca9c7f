"""How busy other processes kept the machine: a figure taken on a machine that someone else uses says so."""

from __future__ import annotations

import os
import time


class ForeignLoad:
    """Average number of cores in use by other processes since this was made."""

    def __init__(self):
        self._start = self._now()

    def cores(self) -> float | None:
        if self._start is None:
            return None
        wall, busy, own = (b - a for a, b in zip(self._start, self._now()))
        return round(max(0.0, (busy - own) / wall), 2) if wall > 0 else None

    def say(self) -> float | None:
        """Print a line where others were busy; returns ``cores``."""
        cores = self.cores()
        if cores:
            print(f"\nOther processes used {cores} cores meanwhile.")
        return cores

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        try:
            with open("/proc/stat") as stat:
                fields = [int(x) for x in stat.readline().split()[1:9]]
        except OSError:
            return None
        user, nice, system, _idle, _iowait, irq, softirq, steal = fields
        own = os.times()
        seconds_of_own = own.user + own.system + own.children_user + own.children_system
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy, seconds_of_own
