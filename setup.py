"""Builds effattn/_cpu.so and, where there is nvcc, effattn/_cuda.so through the LibTorch stable ABI; metadata is in
pyproject.toml.

One wheel, py3-none-<platform>, serves every Python >= 3.10 and torch >= 2.10. Kernel sources are compiled once per ISA level, hence our own ninja file:
torch's BuildExtension knows one set of flags. Where something needed is missing the package installs without the library and runs on plain PyTorch.

EFFATTN_CUDA=1 builds the CUDA kernels and fails without nvcc, 0 leaves them out. By default a wheel has them if nvcc is there, an editable install
only if torch could load them.
"""

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"

OPTIMIZE = "-O3 -fno-math-errno -ffp-contract=fast"
COMPILE = "-std=c++20 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-uninitialized -Wno-maybe-uninitialized"
X86_LEVELS = {
    "baseline": "-march=x86-64-v2",
    "avx2": "-march=x86-64-v3",
    "avx512": "-march=x86-64-v4 -mprefer-vector-width=512",
    "avx512_bf16": "-march=x86-64-v4 -mavx512bf16 -mavx512vnni -mavx512vpopcntdq -mprefer-vector-width=512",
}
LEVELS_OF = {"x86_64": X86_LEVELS, "aarch64": {"baseline": ""}}
PROBE = """template <class T> concept Any = true;
typedef int Vector __attribute__((vector_size(16)));
Vector merge(Vector a, Vector b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
int main() {}
"""
TORCH = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# Ampere's code also runs on Ada; PTX of the oldest is compiled on load by whatever else there is or will be.
GPUS = (
    "arch=compute_80,code=[sm_80,compute_80]",
    "arch=compute_90a,code=sm_90a",
    "arch=compute_100,code=sm_100",
    "arch=compute_120,code=sm_120",
)


def compiler():
    if "CXX" in os.environ:
        return shlex.split(os.environ["CXX"])
    found = next((path for path in map(shutil.which, ("g++", "clang++", "c++")) if path), None)
    return [found] if found else []


def machine():
    """What is compiled for: with a cross compiler in CXX not this machine. torch of that machine has to be visible to the build."""
    if "CXX" in os.environ:
        try:
            asked = subprocess.run([*compiler(), "-dumpmachine"], capture_output=True, text=True, check=False)
        except OSError:
            return platform.machine()  # missing() tells of the compiler
        return asked.stdout.partition("-")[0] or platform.machine()
    return platform.machine()


MACHINE = machine()
LEVELS = LEVELS_OF.get(MACHINE, {})


def compiles(command):
    """Whether the compiler exists and knows C++20, shuffles of vectors and every level's flags."""
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "probe.cpp")
        source.write_text(PROBE)
        for flags in {"", *LEVELS.values()}:
            attempt = [*command, "-std=c++20", *flags.split(), "-c", str(source), "-o", os.devnull]
            try:
                if subprocess.run(attempt, capture_output=True, check=False).returncode:
                    return False
            except OSError:
                return False
    return True


def ninja():
    beside_python = shutil.which("ninja", path=sysconfig.get_path("scripts"))
    return shutil.which("ninja") or beside_python


def torch_directory():
    spec = importlib.util.find_spec("torch")
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def missing():
    """What keeps the library from being built here, as (what, remedy), or None."""
    if sys.platform != "linux" or not LEVELS:
        return f"there are no compiled kernels for {sys.platform} {MACHINE}", "nothing to do"
    if torch_directory() is None:
        return "torch is not visible to the build", "install torch, then: pip install --no-build-isolation effattn"
    if not compiler() or not compiles(compiler()):
        return f"no C++20 compiler (tried {' '.join(compiler()) or 'g++, clang++, c++'})", "install g++ 12 or later"
    if ninja() is None:
        return "ninja is missing", "pip install ninja"
    return None


def nvcc():
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=os.path.join(home, "bin") if home else None) or shutil.which("nvcc")


def torch_has_cuda():
    version = torch_directory() / "version.py"
    return version.exists() and "cuda: Optional[str] = None" not in version.read_text()


def wants_cuda():
    asked = os.environ.get("EFFATTN_CUDA")
    if asked == "1" and nvcc() is None:
        sys.exit("effattn: EFFATTN_CUDA=1, but there is no nvcc on PATH or in CUDA_HOME")
    if asked is not None or nvcc() is None:
        return asked == "1"
    return "bdist_wheel" in sys.argv or torch_has_cuda()


def quote(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def write_cpu_ninja(directory, library):
    """build.ninja for _cpu.so: kernels once per ISA level, everything else once for the oldest one."""
    oldest = next(iter(LEVELS.values()))
    torch = torch_directory()
    jobs = []  # source, object, flags
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        if source.stem == "dispatch":
            jobs.append((source, "dispatch.o", oldest))
            continue
        for level, flags in LEVELS.items():
            jobs.append((source, f"{level}.{source.stem}.o", f"-DEFFATTN_ISA={level} {flags}"))
    includes = f"-isystem {shlex.quote(str(torch / 'include'))}"
    bindings = sorted((CSRC / "bindings").glob("*.cpp"))
    jobs += [(source, f"bindings.{source.stem}.o", f"{oldest} {TORCH} {includes}") for source in bindings]
    jobs.sort(key=lambda job: (job[0].stem not in ("attention", "gaussian_mixture"), job[0]))  # the longest first

    lines = [
        f"cxx = {' '.join(map(shlex.quote, compiler()))}",
        f"flags = {COMPILE} {OPTIMIZE} {os.environ.get('CXXFLAGS', '')}",
        "rule compile",
        "  command = $cxx $flags $extra -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        f"  command = $cxx -shared $in -o $out -Wl,-s -L{shlex.quote(str(torch / 'lib'))} "
        "-Wl,--no-as-needed -ltorch_cpu -ltorch -lc10 -Wl,--as-needed",
        "  description = $out",
    ]
    for source, object_file, extra in jobs:
        lines += [f"build {object_file}: compile {quote(source)}", f"  extra = {extra}"]
    lines += [f"build {quote(library)}: link {' '.join(job[1] for job in jobs)}", f"default {quote(library)}", ""]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "build.ninja").write_text("\n".join(lines))


def write_cuda_ninja(directory, library):
    """build.ninja for _cuda.so: every source once for all GPUs, the runtime linked in."""
    torch = torch_directory()
    targets = " ".join(f"-gencode={shlex.quote(gpu)}" for gpu in GPUS)
    sources = [*sorted((CSRC / "cuda").glob("*.cu")), *sorted((CSRC / "bindings" / "cuda").glob("*.cpp"))]
    lines = [
        f"nvcc = {shlex.quote(nvcc())} -ccbin {shlex.quote(compiler()[0])}",
        f"flags = -std=c++20 -O3 -Xcompiler=-fPIC,-fvisibility=hidden,-Wall -DUSE_CUDA {TORCH} -isystem {shlex.quote(str(torch / 'include'))}",
        "rule compile",
        f"  command = $nvcc $flags {targets} --threads 2 -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        f"  command = $nvcc -shared -cudart static {targets} $in -o $out -Xlinker -s -L{shlex.quote(str(torch / 'lib'))} "
        "-Xlinker --no-as-needed -ltorch_cpu -ltorch -lc10 -Xlinker --as-needed",
        "  description = $out",
    ]
    objects = [f"{source.parent.name}.{source.stem}{source.suffix}.o" for source in sources]
    lines += [f"build {name}: compile {quote(source)}" for name, source in zip(objects, sources)]
    lines += [f"build {quote(library)}: link {' '.join(objects)}", f"default {quote(library)}", ""]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "build.ninja").write_text("\n".join(lines))


class BuildNative(build_ext):
    """Compiles with ninja instead of distutils; no Python header is involved."""

    def finalize_options(self):
        self.objects = Path(
            self.build_temp or ROOT / "build"
        )  # kept, so that an editable install rebuilds what changed
        super().finalize_options()

    def get_ext_filename(self, fullname):
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext):
        directory = self.objects.resolve() / ext.name
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        write_ninja[ext.name](directory, library)
        subprocess.run([ninja(), "-C", str(directory)], check=True)


class AnyPythonWheel(bdist_wheel):
    """No CPython API inside: the tag names the platform only."""

    def get_tag(self):
        python, abi, system = super().get_tag()
        if platform.machine() != MACHINE:
            system = f"linux_{MACHINE}"
        return ("py3", "none", system) if self.distribution.has_ext_modules() else (python, abi, system)


write_ninja = {"effattn._cpu": write_cpu_ninja}

# Metadata is asked for by separate runs of this file; only those that build look for a compiler and speak.
BUILDING = not {"bdist_wheel", "editable_wheel", "build", "build_ext", "install", "develop"}.isdisjoint(sys.argv)
lacking = missing() if BUILDING else None
if lacking:
    print(
        f"effattn: building without compiled kernels, calls will run on plain PyTorch: {lacking[0]}. To change that: {lacking[1]}.",
        file=sys.stderr,
    )

if BUILDING and not lacking and wants_cuda():
    write_ninja["effattn._cuda"] = write_cuda_ninja

BESIDE = {"effattn.triton_kernels": "triton_kernels", "effattn.bench": "bench"}
packages = find_packages(include=["effattn", "effattn.*"])
package_dir = {}
for package, directory in BESIDE.items():
    if (ROOT / directory).is_dir():
        packages += [package, *(f"{package}.{child}" for child in find_packages(directory))]
        package_dir[package] = directory

setup(
    packages=packages,
    package_dir=package_dir,
    package_data={"effattn": ["py.typed"], "effattn.bench": ["*.cpp"]},
    ext_modules=[] if lacking else [Extension(name, sources=[]) for name in write_ninja],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
    zip_safe=False,
)
