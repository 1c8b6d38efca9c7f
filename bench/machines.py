"""The name of a machine's folder in ``bench/results/``, from what a run's JSON says of it."""

from __future__ import annotations

import re

# Generations of AMD's server and desktop cores, by CPU family and the first model of each range: virtual machines
# often hide the product's name. From the table in Linux, arch/x86/kernel/cpu/amd.c.
_ZEN = {
    23: ((0x00, "zen"), (0x30, "zen2"), (0x50, "zen"), (0x60, "zen2")),
    25: ((0x00, "zen3"), (0x10, "zen4"), (0x20, "zen3"), (0x60, "zen4")),
    26: ((0x00, "zen5"),),
}


def folder(about: dict) -> str:
    """``about`` is ``report.machine(...)``: "amd-epyc-zen4-2-cores", or the GPU's name where one did the work."""
    if about["gpu"]:
        return _slug(about["gpu"])
    name, _, model = about["cpu"].partition(" (family ")
    name = re.sub(r"\((R|TM|r|tm)\)|@.*|\b(CPU|Processor|\d+-Core)\b", " ", name)
    known = re.fullmatch(r"(\d+) model (\d+)\)", model)
    if known and not re.search(r"\d", name):  # no product number
        name += " " + (_zen(int(known[1]), int(known[2])) or f"family {known[1]} model {known[2]}")
    return f"{_slug(name)}-{about['cores']}-cores"


def _zen(family: int, model: int) -> str:
    return next((name for first, name in reversed(_ZEN.get(family, ())) if model >= first), "")


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
