"""Tries one built wheel under every Python and torch: python packaging/matrix.py dist/effattn-*.whl

A cell is a fresh virtual environment with one Python and one torch, into which pip installs the wheel. Then, outside the
checkout, ``python -m effattn info``, ``doctor``, the load of the CUDA library and TESTS run against the installed
package. Results go to packaging/matrix.json, a cell that is tried again replaces its entry, and docs/compatibility.md is
written from that file; --render writes the page alone.

uv unpacks each package once for all cells of one torch, so a cell costs a minute and not six gigabytes; when a torch is
done, what was unpacked for it is deleted. PyPI has builds for CUDA; builds for CPU come from UV_FIND_LINKS, or else from
PyTorch's own index. All cells need about 20 GB of disk at a time and download about 30 GB.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = Path(__file__).with_name("matrix.json")
PAGE = ROOT / "docs" / "compatibility.md"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TORCHES = ("2.10.0", "2.11.0", "2.13.0", "2.14.1", "2.15.0")
BUILDS = ("cuda", "cpu")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
NEEDED_BY_TESTS = ("numpy", "pytest", "pytest-xdist", "hypothesis")
# What depends on torch: numbers of every op with its gradients, its schema, export, and DTensor's private modules.
TESTS = (
    "test_conformance.py::test_accuracy_at_every_head_dim",
    "test_conformance_torch.py::test_opcheck",
    "test_conformance_torch.py::test_exports_with_an_open_batch",
    "test_sharding.py",
)
CHOSEN = "not triton and not cuda and (not test_accuracy or (float32 and (-24 or -64)))"

PROBE = """
import json, platform, sys, torch, effattn
from effattn import _library, _native
registered = torch._C._dispatch_has_kernel_for_dispatch_key
print(json.dumps({
    "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
    "where": effattn.__file__, "version": effattn.__version__,
    "cpu library": _native.isa() if _native.loaded else "", "cpu problem": _native.problem,
    "cuda library": _native.cuda_loaded, "cuda problem": _native.cuda_problem,
    "cpu ops": sum(registered(f"effattn::{name}", "CPU") for name in _library._ops),
    "cuda ops": sum(registered(f"effattn::{name}", "CUDA") for name in _library._ops),
}))
"""


class Failed(Exception):
    """A step of a cell ended otherwise than it should; the message is what it printed last."""


class Unavailable(Exception):
    """This Python or this build of torch cannot be had on this machine."""


def run(command: list, where: Path, seconds: float = 1800, **environment: str) -> str:
    """What ``command`` prints; ``Failed`` if it fails."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("EFFATTN_", "PYTHON"))}
    ran = subprocess.run(
        [str(word) for word in command],
        cwd=where,
        env={**inherited, "PYTHONSAFEPATH": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        check=False,
    )
    if ran.returncode:
        raise Failed(ran.stdout.strip()[-1500:] or f"exit status {ran.returncode}")
    return ran.stdout


def install(cell: Path, python: str, torch: str, build: str, cache: Path) -> None:
    """The environment with torch and what the tests need, without effattn."""
    uv = [sys.executable, "-m", "uv", "--quiet", "--cache-dir", cache]
    own = {"UV_PYTHON_DOWNLOADS": "never", "UV_LINK_MODE": "hardlink", "UV_FIND_LINKS": ""}
    wanted = f"torch=={torch}" + ("+cpu" if build == "cpu" else "")
    command = [*uv, "pip", "install", "--python", cell / "bin" / "python", wanted]
    reason = failure_of([*uv, "venv", "--seed", "--python", python, cell], cell.parent, **own)
    if build == "cpu" and not reason:
        sources = [["--find-links", os.environ["UV_FIND_LINKS"]]] if os.environ.get("UV_FIND_LINKS") else []
        for source in (*sources, ["--index", CPU_INDEX]):
            reason = failure_of([*command, "--no-deps", *source], cell, **own)
            if not reason:
                break
    reason = reason or failure_of([*command, *NEEDED_BY_TESTS], cell, **own)
    if reason:
        raise Unavailable(reason)


def failure_of(command: list, where: Path, **environment: str) -> str:
    """What a command that fails says, on one line."""
    try:
        run(command, where, **environment)
    except Failed as failure:
        return re.sub(r" in [\d.]+m?s\b", "", " ".join(str(failure).split()))  # so that the same reads the same
    return ""


def look(cell: Path, build: str) -> dict:
    """What ``import effattn`` finds in a cell, checked against what it must find."""
    python = cell / "bin" / "python"
    found = json.loads(run([python, "-W", "error::DeprecationWarning:effattn", "-c", PROBE], cell).splitlines()[-1])
    if not Path(found.pop("where")).is_relative_to(cell):
        raise Failed("the tests would not run against the installed package")
    if (build == "cuda") != bool(found["cuda"]):
        raise Failed(f"asked for a torch built for {build}, got {found['torch']}")
    if not found["cpu library"]:
        raise Failed(found["cpu problem"])
    info = run([python, "-m", "effattn", "info"], cell)
    line = re.search(r"^cuda library (.*)$", info, re.MULTILINE)
    if not line or (found["cuda problem"] and found["cuda problem"] not in line[1]):
        raise Failed(f"`effattn info` does not say why there is no CUDA library:\n{info}")
    if build == "cpu" and found["cuda problem"] != "this torch is built without CUDA":
        raise Failed(f"a torch without CUDA was given the CUDA library: {found}")
    if found["cuda library"] and not found["cuda ops"]:
        raise Failed("the CUDA library loads but registers nothing")
    run([python, "-m", "effattn", "doctor"], cell)
    return found


def test(cell: Path, jobs: int, without: list[str]) -> dict:
    """Counts of TESTS run against the installed package."""
    chosen = [name for name in TESTS if name not in without]
    if not chosen:
        return {}
    command = [cell / "bin" / "pytest", "-q", "--tb=line", "-rp", "-p", "no:cacheprovider", "-n", jobs, "-k", CHOSEN]
    printed = run([*command, *(ROOT / "tests" / name for name in chosen)], cell, EFFATTN_CUDA_EMULATOR="0")
    passed = [line for line in printed.splitlines() if line.startswith("PASSED ")]
    for name in chosen:
        if not any(name in line for line in passed):
            raise Failed(f"of {name} no test was chosen")
    return {what: int(count) for count, what in re.findall(r"(\d+) (passed|skipped)", printed.splitlines()[-1])}


def commit_of(wheel: Path) -> str | None:
    """The commit that a wheel's record of its making names."""
    with zipfile.ZipFile(wheel) as archive:
        return json.loads(archive.read("effattn/_build.json"))["commit"]


def try_cell(options, python: str, torch: str, build: str) -> dict:
    """The record of one cell."""
    work, wheel = options.work.resolve(), options.wheel.resolve()
    cell = work / f"python{Path(python).parts[-3] if '/' in python else python}-torch{torch}-{build}"
    shutil.rmtree(cell, ignore_errors=True)
    begun = time.monotonic()
    record = {"build": build, "wheel": wheel.name, "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest()}
    record |= {"commit": commit_of(wheel), "without": options.without}
    try:
        install(cell, python, torch, build, work / "cache")
        record["seconds to install"] = round(time.monotonic() - begun)
        python_of_cell = cell / "bin" / "python"
        run([python_of_cell, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wheel], cell)
        run([python_of_cell, "-m", "pip", "check"], cell)
        record |= look(cell, build)
        begun = time.monotonic()
        record |= {
            "result": "passed",
            "tests": test(cell, options.jobs, options.without),
            "seconds of tests": round(time.monotonic() - begun),
        }
    except Unavailable as reason:
        record |= {"result": "not to be had here", "reason": str(reason)}
    except (Failed, subprocess.TimeoutExpired) as failure:
        record |= {"result": "failed", "reason": str(failure)}
    if not options.keep:
        shutil.rmtree(cell, ignore_errors=True)
    return record


HEADER = """\
<!-- Made by `python packaging/matrix.py` from packaging/matrix.json. Do not edit. -->

# Compatibility

For each row pip installs the built wheel into a fresh environment with that Python and torch. Outside the checkout
`python -m effattn info` then says what it must, `doctor` finds nothing wrong, and these of `tests/` run against the installed
package, as far as they are about the CPU kernels and the reference, without a GPU:

{tests}

`make matrix` does it again.

The CUDA column says whether `_cuda.so` loads into that torch and how many ops it registers. Without a GPU its kernels are not
run. In a build of torch for CPU the library is not loaded, and `info` says why.
"""

AARCH64 = """
## aarch64

`make aarch64` cross-compiles the CPU library against the libraries of torch 2.10 for aarch64, leaves the wheel in `dist/`, and
runs its kernels in qemu against plain loops in double: every family, forward and backward, float32 and bfloat16. It has not run on
such a processor, nor under a Python there. By hand, `CXX` says for what is compiled, and torch of that machine has to be visible:

```bash
pip install --target arm --no-deps --only-binary :all: --platform manylinux_2_28_aarch64 torch==2.10.0
PYTHONPATH=arm CXX=aarch64-linux-gnu-g++ EFFATTN_CUDA=0 pip wheel --no-build-isolation --no-deps .
```
"""


def version(record: dict) -> str:
    """That of the wheel, such as 0.1.0+cu12."""
    return record["wheel"].split("-")[1]


def place(record: dict) -> tuple:
    """Where a record stands in the table, and which other record it replaces."""
    asked = (*record["asked torch"].split("."), *record["asked python"].split("."))
    return tuple(int(part) for part in asked), record["build"], version(record)


def counted(record: dict) -> str:
    """What the table says of the tests of a cell that passed."""
    counts = record["tests"]
    if not counts:
        return "not run; import, `info` and `doctor` only"
    left_out = "".join(f", without `{name}`" for name in record["without"])
    return f"{counts['passed']} passed, {counts.get('skipped', 0)} skipped{left_out}"


def render(records: list[dict]) -> str:
    """The page of these records."""
    lines = [HEADER.format(tests="\n".join(f"- `{name}`" for name in TESTS))]
    lines += ["| torch | Python | CPU tests | CUDA library | wheel of commit |", "| --- | --- | --- | --- | --- |"]
    unavailable: dict[tuple[str, str], list[str]] = {}
    for record in sorted(records, key=place):
        torch = record.get("torch", f"{record['asked torch']}, {record['build'].upper()} build")
        python = record.get("python", record["asked python"])
        if record["result"] == "not to be had here":
            unavailable.setdefault((torch, record["reason"].split("cause: ")[-1]), []).append(python)
            continue
        if record["result"] == "passed":
            tests = counted(record)
            cuda = f"loads, {record['cuda ops']} ops" if record["cuda library"] else record["cuda problem"]
        else:
            tests, cuda = "failed: " + " ".join(record["reason"].replace("|", "/").split()), "-"
        commit = (record.get("commit") or "unknown")[:10]
        lines.append(f"| {torch} | {python} | {tests} | {cuda} | {version(record)} of {commit} |")
    lines += ["", "Not to be had on this machine:", ""] if unavailable else []
    for (torch, reason), pythons in unavailable.items():
        lines.append(f"- {torch}, for Python {', '.join(pythons)}: {reason}")
    return "\n".join(lines).rstrip() + "\n" + AARCH64


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 if a cell failed; one that cannot be had here is no failure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("wheel", nargs="?", type=Path, help="the wheel to try")
    parser.add_argument("--python", nargs="+", default=PYTHONS, help="versions, or paths of interpreters")
    parser.add_argument("--torch", nargs="+", default=TORCHES, help="releases of torch")
    parser.add_argument("--build", nargs="+", default=BUILDS, choices=BUILDS)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "matrix", help="where environments are made")
    parser.add_argument("--jobs", type=int, default=2, help="processes of pytest")
    parser.add_argument("--without", nargs="+", default=[], choices=TESTS, help="tests that this run leaves out")
    parser.add_argument("--record", type=Path, default=RECORD, help="the JSON file of results")
    parser.add_argument("--keep", action="store_true", help="do not delete the environments")
    parser.add_argument("--render", action="store_true", help="only write the page from the record")
    options = parser.parse_args(argv)
    records = json.loads(options.record.read_text()) if options.record.exists() else []
    failed = False
    if not options.render:
        if options.wheel is None or not options.wheel.is_file():
            parser.error(f"wheel must be a file, got {options.wheel}")
        options.work.mkdir(parents=True, exist_ok=True)
        for torch in options.torch:
            for python in options.python:
                for build in options.build:
                    records, record = tried(records, options, python, torch, build)
                    failed |= record["result"] == "failed"
            shutil.rmtree(options.work / "cache", ignore_errors=True)
    PAGE.write_text(render(records))
    return int(failed)


def tried(records: list[dict], options, python: str, torch: str, build: str) -> tuple[list[dict], dict]:
    """The records with that of one cell, written at once: a run may be cut off."""
    found = re.search(r"3\.\d+", python)
    if not found:
        raise SystemExit(f"--python takes versions and paths that name one, got {python}")
    asked = {"asked python": found[0], "asked torch": torch}
    day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    record = {**asked, "day": day, **try_cell(options, python, torch, build)}
    print(
        f"python {found[0]}, torch {torch}, {build}: {record['result']} {record.get('reason', '')[-300:]}", flush=True
    )
    records = [other for other in records if place(other) != place(record)]
    records.append(record)
    options.record.write_text(json.dumps(sorted(records, key=place), indent=1) + "\n")
    return records, record


if __name__ == "__main__":
    sys.exit(main())
