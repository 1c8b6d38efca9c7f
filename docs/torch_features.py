"""Writes docs/torch_features.md by running every check on the cpu backend: python docs/torch_features.py [--check]

The checks, and one sample call of every registered operator, are tests/torch_features. --check exits 1 if the committed
page differs. It takes a minute or two; tests/test_torch_features.py holds the page to the same checks in CI.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from torch_features import AOT, FEATURES, cell
from torch_features.aot import Package

from effattn import _registry

PAGE = Path(__file__).with_name("torch_features.md")
Cells = dict[tuple[str, str], tuple[str, str]]  # (operator, feature) -> (word, reason)

HEADER = """\
<!-- Made by `python docs/torch_features.py` from the checks of tests/torch_features. Do not edit. -->

# What torch can do with every operator

One row for every registered operator, one column for every feature of torch, found by running a check for each cell on the
`cpu` backend (float32, small shapes). The same checks run in CI, which fails if a cell changes. A number points to the
reason below the table. A new operator has to have a sample call in `tests/torch_features/samples.py` before the suite passes.
"""

NOTES = """
## Notes

- A package of AOTInductor calls the kernels by their torch ops, which `import effattn` declares: the process that loads it
  has to import effattn first.
- `torch.func.jvp` of a function that is compiled already is refused by torch.
- Sharded training (DDP, FSDP2, DTensor) is tested on its own.
"""


def operators() -> list[str]:
    return sorted(_registry.operators())


def render(cells: Cells) -> str:
    """The page of these cells."""
    reasons = dict.fromkeys(reason for _, reason in cells.values() if reason)
    number = {reason: place for place, reason in enumerate(reasons, 1)}
    lines = [HEADER.rstrip("\n"), "", "| | " + " | ".join(f.name for f in FEATURES) + " |"]
    lines.append("|" + " --- |" * (len(FEATURES) + 1))
    for op in operators():
        words = (cells[op, f.name] for f in FEATURES)
        row = (word if not reason else f"{word} <sup>{number[reason]}</sup>" for word, reason in words)
        lines.append(f"| `{op}` | " + " | ".join(row) + " |")
    lines += ["", *(f"{place}. {reason}" for reason, place in number.items())]
    lines += ["\n## What the columns say\n", *(f"- **{f.name}**: {f.meaning}" for f in FEATURES)]
    return "\n".join(lines) + "\n" + NOTES


def parse(page: str) -> Cells:
    """The cells of a page that `render` made."""
    reasons = dict(re.findall(r"^(\d+)\. (.+)$", page, re.MULTILINE))
    cells = {}
    for op, row in re.findall(r"^\| `([^`]+)` \| (.+) \|$", page, re.MULTILINE):
        for feature, text in zip(FEATURES, row.split(" | ")):
            word, _, number = text.removesuffix("</sup>").partition(" <sup>")
            cells[op, feature.name] = word, reasons[number] if number else ""
    return cells


def run_everything() -> Cells:
    cells = {}
    with tempfile.TemporaryDirectory() as folder:
        package = Package(tuple(operators()), "cpu", Path(folder))
        for op in operators():
            for feature in FEATURES:
                print(f"{op}: {feature.name}", file=sys.stderr)  # the last line before a traceback says what failed
                cells[op, feature.name] = cell(op, feature, package=package if feature.name == AOT else None)
    return cells


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Write docs/torch_features.md from the checks in tests/torch_features."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the committed page is stale")
    check = parser.parse_args(argv).check
    wanted = render(run_everything())
    if not check:
        PAGE.write_text(wanted)
        return 0
    if not PAGE.exists() or PAGE.read_text() != wanted:
        print(f"{PAGE} is stale; run: python docs/torch_features.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
