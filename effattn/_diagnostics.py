"""What this installation has (``info``) and what is wrong with it, with the command that mends it (``doctor``)."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from pathlib import Path

import torch

from . import _driver, _native, _registry, _tuning
from ._version import __version__

OLDEST_TORCH = (2, 10)
CPU_ISA_LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16")
_PROJECT = Path(__file__).resolve().parent.parent
_BUILD = Path(__file__).with_name("_build.json")


def info() -> int:
    """Print versions, libraries and which backend serves which operator here. Always succeeds."""
    print(f"effattn      {__version__} at {Path(__file__).parent}")
    print(f"build        {_build()}")
    print(f"python       {platform.python_version()} on {platform.platform()}")
    print(f"torch        {torch.__version__} (CUDA {torch.version.cuda}, HIP {torch.version.hip})")
    print(f"triton       {_version_of('triton')}")
    print(f"cpu library  {_cpu_library()}")
    print(f"cuda library {_native.CUDA_LIBRARY.name if _native.cuda_loaded else f'none: {_native.cuda_problem}'}")
    print(f"gpu          {_gpu()}")
    print(f"tuning       {_tuning.summary()}")
    for name in ("EFFATTN_BACKEND", "EFFATTN_CPU_ISA", "EFFATTN_TUNING", "TRITON_INTERPRET"):
        if os.environ.get(name):
            print(f"{name}={os.environ[name]}")
    if not _native.loaded:
        print(f"\n{_native.problem}: calls on CPU run on the reference (plain PyTorch).\nTo fix it:  {_rebuild()}")
    print(f"\nBackends by operator (float32, head_dim 64, {torch.get_num_threads()} CPU threads):")
    for op in _registry.operators():
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            found = _registry.verdicts(op, _registry.Problem(device, torch.float32, 64))
            print(f"  {op} on {device}: " + ", ".join(f"{v.backend} {'yes' if v.ok else 'no'}" for v in found))
    return 0


def doctor() -> int:
    """Print each thing that is wrong with the exact command that fixes it; 0 if nothing is."""
    problems = [*_installation_problems(), *_code_problems(), *_wrong_results()]
    _print_problems(problems)
    if not problems:
        print(f"effattn {__version__}: nothing wrong. cpu library: {_cpu_library()}; gpu: {_gpu()}{_generations()}")
    return 1 if problems else 0


def doctor_gpu(seconds: float, report: Path | None) -> int:
    """Check every GPU of this node and print a line for each; 0 if all is well, 2 if there is none, else 1."""
    from . import _node

    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # this process must not wait for a GPU that hangs
    problems = _installation_problems()
    _print_problems(problems)
    return _node.check_node(seconds, report, [what for what, _ in problems])


def _installation_problems() -> list[tuple[str, str]]:
    return [*_torch_problems(), *_library_problems(), *_driver_problems(), *_gpu_problems(), *_environment_problems()]


def _print_problems(problems: list[tuple[str, str]]) -> None:
    for what, remedy in problems:
        print(f"problem: {what}\n    fix: {remedy}")


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _build() -> str:
    """What the wheel says of its making, over several lines; a checkout has no such record."""
    if not _BUILD.exists():
        return f"editable checkout at {_PROJECT}" if (_PROJECT / "setup.py").exists() else "not recorded"
    made = json.loads(_BUILD.read_text())
    changes = {True: ", with uncommitted changes", False: "", None: ""}[made["dirty"]]
    day = f" of {datetime.datetime.fromtimestamp(made['date'], datetime.timezone.utc):%Y-%m-%d}" if made["date"] else ""
    lines = [f"wheel {made['version']} for {_platform_tag()}, commit {made['commit'] or 'unknown'}{day}{changes}"]
    if made["without"]:
        lines.append(f"without compiled kernels: {made['without']}")
    if made["cpu"]:
        lines.append(f"cpu   {made['cpu']['compiler']} for {', '.join(made['cpu']['levels'])}")
        lines.append(f"      {made['cpu']['flags']}")
    if made["cuda"]:
        lines.append(f"cuda  {made['cuda']['compiler']} for {', '.join(made['cuda']['architectures'])}")
        lines.append(f"      {made['cuda']['flags']}")
    if made["torch"]:
        lines.append(
            f"torch {made['torch']['headers']} headers, {made['torch']['oldest']} or later to run; {made['libc']}"
        )
    return ("\n" + " " * 13).join(lines)


def _platform_tag() -> str:
    try:
        tags = importlib.metadata.distribution("effattn").read_text("WHEEL") or ""
    except importlib.metadata.PackageNotFoundError:
        tags = ""
    named = [line.split("-", 2)[2] for line in tags.splitlines() if line.startswith("Tag: ")]
    return " ".join(named) or "an unknown platform"


def _cpu_library() -> str:
    return f"{_native.CPU_LIBRARY.name}, {_native.isa()} kernels" if _native.loaded else f"none: {_native.problem}"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (compute capability {major}.{minor}), {torch.cuda.device_count()} in all"


def _python() -> str:
    return sys.executable or "python"


def _rebuild() -> str:
    if (_PROJECT / "setup.py").exists():
        return f"{_python()} -m pip install -e {_PROJECT} --no-build-isolation"
    return f"{_python()} -m pip install --force-reinstall --no-deps --no-build-isolation effattn"


def _torch_problems():
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < OLDEST_TORCH:
        wanted = ".".join(map(str, OLDEST_TORCH))
        yield f"torch {torch.__version__} is older than {wanted}", f'{_python()} -m pip install "torch>={wanted}"'


def _library_problems():
    if _native.loaded:
        return
    missing = [tool for tool in (os.environ.get("CXX", "g++"), "ninja") if shutil.which(tool) is None]
    before = ""
    if "ninja" in missing:
        before += f"{_python()} -m pip install ninja && "
    if missing and missing != ["ninja"]:
        before += "apt-get install -y g++ && "
    yield _native.problem, before + _rebuild()


def _driver_problems():
    """A driver older than torch or the CUDA kernels need."""
    driver = _driver.driver()
    if not torch.version.cuda or driver is None:
        return
    build = cuda_build()
    for what, toolkit in (
        (f"torch {torch.__version__}", _torch_toolkit()),
        ("effattn/_cuda.so", build and build.toolkit),
    ):
        why = toolkit and _driver.driver_problem(driver, toolkit, what)
        if why:
            yield why, _driver.driver_remedy(driver, toolkit)


def _code_problems():
    """GPUs that the CUDA kernels have no code for."""
    build = cuda_build() if torch.version.cuda and torch.cuda.is_available() else None
    if build:
        gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        found = [(gpu.name, (gpu.major, gpu.minor)) for gpu in gpus]
        yield from _driver.gpu_problems(found, build, _driver.driver())


def _torch_toolkit() -> tuple[int, int]:
    major, minor = torch.version.cuda.split(".")[:2]
    return int(major), int(minor)


def cuda_build() -> _driver.Build | None:
    """What the wheel says of the CUDA library's build, else what the library itself does."""
    build = _driver.build()
    if build is None and _native.cuda_loaded and _native.cuda_device == "cuda":
        version = torch.ops.effattn.cuda_toolkit()
        build = _driver.Build((version // 1000, version % 1000 // 10), ())
    return build


def _generations() -> str:
    """A remark where torch and the CUDA kernels are built with CUDA of different generations, which is no problem."""
    build = cuda_build() if torch.version.cuda else None
    if build is None or build.toolkit[0] == _torch_toolkit()[0]:
        return ""
    ours = ".".join(map(str, build.toolkit))
    return f"; torch is built with CUDA {torch.version.cuda}, the kernels with {ours}: each has its own runtime, the driver must serve both"


def _gpu_problems():
    if torch.cuda.is_available() and not _registry.has_triton():
        yield "a GPU is here but triton is not", f"{_python()} -m pip install triton"
    if torch.cuda.is_available() and torch.version.cuda and not _native.cuda_loaded:
        yield _native.cuda_problem, f"EFFATTN_CUDA=1 {_rebuild()}"


def _environment_problems():
    forced = os.environ.get("EFFATTN_BACKEND")
    if forced and forced not in ("auto", *_registry.BACKENDS):
        yield f"EFFATTN_BACKEND={forced} names no backend", "unset EFFATTN_BACKEND"
    level = os.environ.get("EFFATTN_CPU_ISA")
    if level and level not in CPU_ISA_LEVELS:
        yield f"EFFATTN_CPU_ISA={level} is none of {', '.join(CPU_ISA_LEVELS)}, and ignored", "unset EFFATTN_CPU_ISA"
    if os.environ.get("TRITON_INTERPRET") == "1" and torch.cuda.is_available():
        yield "TRITON_INTERPRET=1 runs GPU kernels in a slow interpreter", "unset TRITON_INTERPRET"


def _wrong_results():
    """Every backend that says it can serve a small training step must agree with the reference on it."""
    from .ops import gaussian_mixture_attention

    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        generator = torch.Generator().manual_seed(0)
        query, key, value = torch.randn(3, 1, 2, 31, 16, generator=generator).to(device)
        alpha, sigma = torch.randn(2, 3, 2, generator=generator).to(device)
        inputs = [tensor.requires_grad_() for tensor in (query.clone(), key.clone(), value.clone(), alpha, sigma)]

        def step(backend, inputs=inputs):
            output = gaussian_mixture_attention(*inputs, (6, 5), num_prefix_tokens=1, backend=backend)
            return output, *torch.autograd.grad(output.square().sum(), inputs)

        expected = step("reference")
        for verdict in _registry.verdicts("gaussian_mixture_attention", _registry.Problem(device, query.dtype, 16)):
            if not verdict.ok or verdict.backend == "reference":
                continue
            try:
                errors = [(got - want).abs().max() for got, want in zip(step(verdict.backend), expected)]
                error = torch.stack(errors).max().item()  # unlike max(), keeps a NaN
            except Exception as failure:  # noqa: BLE001 - whatever a broken driver or compiler raises is the finding
                yield f"backend {verdict.backend} on {device} fails: {str(failure).splitlines()[0]}", _rebuild()
            else:
                if not error < 1e-3:
                    yield (
                        f"backend {verdict.backend} on {device} is wrong by {error:.1e}",
                        f"export EFFATTN_BACKEND=reference, and report it with `{_python()} -m effattn info`",
                    )
