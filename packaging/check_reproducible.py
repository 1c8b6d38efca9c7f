"""Builds the wheel of HEAD twice, in two places, and names the members that differ.

    make reproducible            as `make wheel`, twice
    CUDA=0 make reproducible     without CUDA kernels

Leaves the wheel in dist/ if the bytes are the same.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import build_info


def wheel_of_head(directory):
    """`make wheel` in a fresh clone that has a temporary folder of its own."""
    checkout, temporary = directory / "effattn", directory / "tmp"
    temporary.mkdir(parents=True)
    subprocess.run(["git", "clone", "--quiet", "--shared", str(build_info.ROOT), str(checkout)], check=True)
    command = [sys.executable, "packaging/make_wheel.py"]
    subprocess.run(command, cwd=checkout, env=dict(os.environ, TMPDIR=str(temporary)), check=True)
    (wheel,) = (checkout / "dist").glob("*.whl")
    return wheel


def differences(first, second):
    """What tells two archives apart, one line for each member."""
    members = []
    for path in (first, second):
        with zipfile.ZipFile(path) as archive:
            members.append({entry.filename: (entry, archive.read(entry)) for entry in archive.infolist()})
    one, other = members
    yield from (f"{name} is only in one" for name in sorted(one.keys() ^ other.keys()))
    for name in sorted(one.keys() & other.keys()):
        (entry, content), (entry2, content2) = one[name], other[name]
        if content != content2:
            yield f"{name} differs, {len(content)} and {len(content2)} bytes"
        for what in ("date_time", "external_attr", "compress_type", "header_offset"):
            if getattr(entry, what) != getattr(entry2, what):
                yield f"{name} has {what} {getattr(entry, what)} and {getattr(entry2, what)}"


def main():
    with tempfile.TemporaryDirectory() as scratch:
        first = wheel_of_head(Path(scratch, "one"))
        second = wheel_of_head(Path(scratch, "another", "place"))
        if first.name != second.name:
            sys.exit(f"effattn: one wheel is {first.name}, the other {second.name}")
        if first.read_bytes() != second.read_bytes():
            found = list(differences(first, second)) or ["the members are the same, the archives are not"]
            sys.exit(f"effattn: {first.name} is not reproducible:\n" + "\n".join(f"  {line}" for line in found))
        destination = build_info.ROOT / "dist"
        destination.mkdir(exist_ok=True)
        shutil.copy(second, destination)
    print(f"{second.name}: the same bytes twice")


if __name__ == "__main__":
    main()
