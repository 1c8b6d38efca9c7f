"""The nvcc that compiles the CUDA library, and the GPUs that it compiles for."""

import os
import re
import shutil
import subprocess

# PTX of the oldest, compiled by the driver on load, serves every GPU that has no code of its own here: all later ones, and Orin's 87.
RELEASE = "80+PTX;86;89;90a;100;120"
DEFAULT = "80+PTX;90a;100;120"  # 86 and 89 run the code of 80

ARCHITECTURE = re.compile(r"(?P<number>\d{2,3})(?P<feature>[af]?)(?P<ptx>\+PTX)?")


def nvcc():
    """Path of the compiler in CUDA_HOME or on PATH, or None."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=os.path.join(home, "bin") if home else None) or shutil.which("nvcc")


def version(compiler):
    """As in "13.0.88"."""
    return re.search(r", V([\d.]+)", _says(compiler, "--version"))[1]


def has_seed(compiler):
    """Whether -frandom-seed is an option: of 13.0, not yet of 12.4."""
    return "-frandom-seed" in _says(compiler, "--help")


def architectures(asked, compiler):
    """What EFFATTN_CUDA_ARCHITECTURES names: a list such as "80+PTX;90a", or "release" for those of RELEASE that the compiler knows."""
    known = set(re.findall(r"sm_(\d+)", _says(compiler, "--list-gpu-code")))
    chosen = [_matched(entry, asked) for entry in (RELEASE if asked == "release" else asked or DEFAULT).split(";")]
    unknown = [entry["number"] for entry in chosen if entry["number"] not in known]
    if unknown and asked and asked != "release":
        raise ValueError(
            f"EFFATTN_CUDA_ARCHITECTURES={asked}: nvcc {version(compiler)} does not compile for {', '.join(unknown)}, "
            f"only for {', '.join(sorted(known, key=int))}"
        )
    return [entry.group() for entry in chosen if entry["number"] in known]


def gencode(architecture):
    """What -gencode takes for "80+PTX"."""
    entry = _matched(architecture, architecture)
    name = entry["number"] + entry["feature"]
    return (
        f"arch=compute_{name},code=[sm_{name},compute_{name}]"
        if entry["ptx"]
        else f"arch=compute_{name},code=sm_{name}"
    )


def _matched(entry, asked):
    found = ARCHITECTURE.fullmatch(entry)
    if not found:
        raise ValueError(
            f'EFFATTN_CUDA_ARCHITECTURES={asked}: {entry!r} is no architecture; wanted "release" or a list such as "80+PTX;90a;120", '
            "compute capabilities without a point"
        )
    return found


def _says(compiler, option):
    return subprocess.run([compiler, option], capture_output=True, text=True, check=True).stdout
