"""Writes the table of docs/distributed.md from the axes that the ops declare: python docs/distributed.py [--check]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from effattn import _library

PAGE = Path(__file__).with_name("distributed.md")
BEGIN, END = "<!-- table: python docs/distributed.py -->", "<!-- end of the table -->"


def table() -> str:
    """One line for each op that has no backward or is a forward."""
    lines = ["| op | may be sharded along | whole on every rank then |", "| --- | --- | --- |"]
    for op in sorted(_library._ops.values(), key=lambda op: op.name):
        if op.name.endswith("_bwd") or op.name == "retention_step_":
            continue
        schema = op.overload("triton")._schema
        tensors = [argument.name for argument in schema.arguments if "Tensor" in str(argument.type)]
        along = [f"{axis} ({_where(op, tensors, axis)})" for axis in op.splits]
        rest = [_rest(op, tensors, axis) for axis in op.splits]
        lines.append(
            f"| `{op.name.removesuffix('_fwd')}` | {'; '.join(along)} | {'; '.join(filter(None, rest)) or '-'} |"
        )
    return "\n".join(lines)


def _where(op, tensors, axis: str) -> str:
    """Which dimension of which tensors."""
    by_dimension: dict[int, list[str]] = {}
    for name in tensors:
        if axis in op.axes.get(name, ()):
            by_dimension.setdefault(op.axes[name].index(axis), []).append(f"`{name}`")
    return ", ".join(f"{', '.join(names)}: {dimension}" for dimension, names in sorted(by_dimension.items()))


def _rest(op, tensors, axis: str) -> str:
    names = ", ".join(f"`{name}`" for name in tensors if axis not in op.axes.get(name, ()))
    return f"{axis}: {names}" if names else ""


def page() -> str:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is stale")
    check = parser.parse_args(arguments).check
    wanted = page()
    if check:
        return int(PAGE.read_text() != wanted)
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
