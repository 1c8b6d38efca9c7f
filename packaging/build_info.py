"""What a wheel tells about its making: effattn/_build.json, shown by `python -m effattn info`."""

import json
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "packaging" / "source.json"  # only in an sdist, which has no git
UNKNOWN = {"commit": None, "date": None, "dirty": None}


def source():
    """The commit of this tree, its date and whether the tree differs from it; of an sdist, those of its maker's tree."""
    if SOURCE.exists():
        return json.loads(SOURCE.read_text())
    try:
        if Path(_git("rev-parse", "--show-toplevel")) != ROOT:  # another project's repository around this tree
            return UNKNOWN
        commit, date = _git("log", "-1", "--format=%H %ct").split()
        return {"commit": commit, "date": int(date), "dirty": bool(_git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN


def write(path, **facts):
    """Nothing of it may depend on where or when the build runs."""
    facts = {**source(), "libc": " ".join(platform.libc_ver()), **facts}
    path.write_text(json.dumps(facts, indent=1) + "\n")


def first_line(command):
    """Of what `g++ --version` says."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def _git(*arguments):
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
