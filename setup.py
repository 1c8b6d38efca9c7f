"""Builds effattn/_cpu.so and, where there is nvcc, effattn/_cuda.so through the LibTorch stable ABI; metadata is in
pyproject.toml.

One wheel, py3-none-<platform>, serves every Python >= 3.10 and torch >= 2.10. Kernel sources are compiled once per ISA level, hence our own ninja file:
torch's BuildExtension knows one set of flags. Where something needed is missing the build fails and says what; EFFATTN_NATIVE=0 installs without the
libraries, as a system for which there are no kernels does.

EFFATTN_CUDA=1 builds the CUDA kernels and fails without nvcc, 0 leaves them out. By default a wheel has them if nvcc is there, an editable install
only if torch could load them. EFFATTN_CUDA_ARCHITECTURES says for which GPUs, see packaging/cuda_toolkit.py.
EFFATTN_LOCAL_VERSION=cu12 makes the version 0.1.0+cu12. MAX_JOBS limits the compilers that run at a time.
"""

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
sys.path.insert(0, str(ROOT / "packaging"))

import build_info  # noqa: E402
import cuda_toolkit  # noqa: E402

OPTIMIZE = "-O3 -fno-math-errno -ffp-contract=fast"
COMPILE = "-std=c++20 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-uninitialized -Wno-maybe-uninitialized"
X86_LEVELS = {
    "baseline": "-march=x86-64-v2",
    "avx2": "-march=x86-64-v3",
    "avx512": "-march=x86-64-v4 -mprefer-vector-width=512",
    "avx512_bf16": "-march=x86-64-v4 -mavx512bf16 -mavx512vnni -mavx512vpopcntdq -mprefer-vector-width=512",
}
LEVELS_OF = {"x86_64": X86_LEVELS, "aarch64": {"baseline": ""}}
LOCAL_VERSION = "+" + os.environ["EFFATTN_LOCAL_VERSION"] if os.environ.get("EFFATTN_LOCAL_VERSION") else ""
PROBE = """template <class T> concept Any = true;
typedef int Vector __attribute__((vector_size(16)));
Vector merge(Vector a, Vector b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
int main() {}
"""
OLDEST_TORCH = "2.10"
TORCH = "-DTORCH_TARGET_VERSION=0x020a000000000000"
NVCC = "-std=c++20 -O3 -Xcompiler=-fPIC,-fvisibility=hidden,-Wall -DUSE_CUDA"


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


def unsupported():
    """Why there is nothing to build here, or None."""
    if os.environ.get("EFFATTN_NATIVE") == "0":
        return "EFFATTN_NATIVE=0"
    if sys.platform != "linux" or not LEVELS:
        return f"there are no compiled kernels for {sys.platform} {MACHINE}"
    return None


def missing():
    """What keeps the library from being built here, as (what, remedy), or None."""
    if torch_directory() is None:
        return "torch is not visible to the build", "pip install torch setuptools ninja"
    if not compiler() or not compiles(compiler()):
        return f"no C++20 compiler (tried {' '.join(compiler()) or 'g++, clang++, c++'})", "install g++ 12 or later"
    if ninja() is None:
        return "ninja is missing", "pip install ninja"
    return None


def torch_has_cuda():
    version = torch_directory() / "version.py"
    return version.exists() and "cuda: Optional[str] = None" not in version.read_text()


def wants_cuda():
    asked = os.environ.get("EFFATTN_CUDA")
    if asked == "1" and cuda_toolkit.nvcc() is None:
        sys.exit("effattn: EFFATTN_CUDA=1, but there is no nvcc on PATH or in CUDA_HOME")
    if asked is not None or cuda_toolkit.nvcc() is None:
        return asked == "1"
    return "bdist_wheel" in sys.argv or torch_has_cuda()


def quote(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def reproducible():
    """Flags that keep the path of torch's headers out of the messages that they compile in."""
    return f"-ffile-prefix-map={torch_directory()}=torch"


def torch_includes():
    return f"{TORCH} -isystem {shlex.quote(str(torch_directory() / 'include'))}"


def link(option=""):
    """Arguments that link torch, each with ``option`` before it if it is the linker's own.

    libstdc++ comes first: torch exports some of its symbols, unversioned, and not in every build of it. All are linked
    whether needed or not, for libtorch.so brings libtorch_cuda.so where there is one. (No --as-needed ends that: nvcc puts
    all options of the linker before all libraries.)
    """
    linker = [
        "-s",
        f"--version-script={CSRC / 'bindings' / 'exports.map'}",
        f"-L{torch_directory() / 'lib'}",
        "--no-as-needed",
    ]
    return " ".join(option + shlex.quote(argument) for argument in linker) + " -lstdc++ -ltorch_cpu -ltorch -lc10"


def relative(source):
    """A source as the compiler is to name it: its path must not depend on where the checkout lies."""
    return source.relative_to(ROOT)


def write_build(directory, library, rules, jobs):
    """build.ninja, for ninja in ROOT; ``jobs`` are (source, object, further flags)."""
    lines = [f"builddir = {quote(directory)}", *rules]
    for source, name, extra in jobs:
        lines += [f"build $builddir/{name}: compile {quote(relative(source))}", f"  extra = {extra}"]
    objects = " ".join(f"$builddir/{name}" for _, name, _ in jobs)
    lines += [f"build {quote(library)}: link {objects}", f"default {quote(library)}", ""]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "build.ninja").write_text("\n".join(lines))


def rules(compile_command, link_command):
    return [
        "rule compile",
        f"  command = {compile_command} $extra -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        f"  command = {link_command}",
        "  description = $out",
    ]


def cpu_flags():
    return f"{COMPILE} {OPTIMIZE} {os.environ.get('CXXFLAGS', '')}".strip()


def write_cpu_ninja(directory, library):
    """build.ninja for _cpu.so: kernels once per ISA level, everything else once for the oldest one."""
    oldest = next(iter(LEVELS.values()))
    jobs = []
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        if source.stem == "dispatch":
            jobs.append((source, "dispatch.o", oldest))
            continue
        for level, flags in LEVELS.items():
            jobs.append((source, f"{level}.{source.stem}.o", f"-DEFFATTN_ISA={level} {flags}"))
    bindings = sorted((CSRC / "bindings").glob("*.cpp"))
    extra = f"{oldest} {shlex.quote(reproducible())} {torch_includes()}"
    jobs += [(source, f"bindings.{source.stem}.o", extra) for source in bindings]
    jobs.sort(key=lambda job: (job[0].stem not in ("attention", "gaussian_mixture"), job[0]))  # the longest first

    cxx = shlex.join(compiler())
    write_build(directory, library, rules(f"{cxx} {cpu_flags()}", f"{cxx} -shared $in -o $out {link('-Wl,')}"), jobs)


def host_compiler():
    """nvcc takes no ccache before it."""
    return next(part for part in compiler() if Path(part).name != "ccache")


def architectures():
    try:
        return cuda_toolkit.architectures(os.environ.get("EFFATTN_CUDA_ARCHITECTURES"), cuda_toolkit.nvcc())
    except ValueError as error:
        sys.exit(f"effattn: {error}")


def write_cuda_ninja(directory, library):
    """build.ninja for _cuda.so: every source once for all GPUs, the runtime linked in."""
    nvcc = shlex.join([cuda_toolkit.nvcc(), "-ccbin", host_compiler()])
    gpus = " ".join(f"-gencode={shlex.quote(cuda_toolkit.gencode(name))}" for name in architectures())
    # nvcc mangles a hash of the absolute path into the names of kernels, and of some sources its process's number
    names = "-Xcudafe --orig_src_path_name={0}" + " -frandom-seed={0}" * cuda_toolkit.has_seed(cuda_toolkit.nvcc())
    jobs = [
        (source, f"cuda.{source.name}.o", names.format(relative(source)))
        for source in sorted((CSRC / "cuda").glob("*.cu"))
    ]
    extra = f"{shlex.quote(f'-Xcompiler={reproducible()}')} {torch_includes()}"
    jobs += [
        (source, f"bindings.{source.name}.o", extra) for source in sorted((CSRC / "bindings" / "cuda").glob("*.cpp"))
    ]
    commands = (
        f"{nvcc} {NVCC} {gpus} --threads 2",
        f"{nvcc} -shared -cudart static {gpus} $in -o $out {link('-Xlinker ')}",
    )
    write_build(directory, library, rules(*commands), jobs)


def torch_version():
    """Of the headers, without what tells builds of it apart."""
    return re.search(r"__version__ = '([^'+]*)", (torch_directory() / "version.py").read_text())[1]


def facts():
    """What effattn/_build.json is to hold besides the commit."""
    found = {"without": lacking, "torch": None, "cpu": None, "cuda": None}
    if "effattn._cpu" in libraries:
        found["torch"] = {"headers": torch_version(), "oldest": OLDEST_TORCH}
        compiled = build_info.first_line([*compiler(), "--version"])
        found["cpu"] = {"compiler": compiled, "flags": cpu_flags(), "levels": LEVELS}
    if "effattn._cuda" in libraries:
        nvcc = f"nvcc {cuda_toolkit.version(cuda_toolkit.nvcc())}"
        found["cuda"] = {"compiler": nvcc, "flags": NVCC, "architectures": architectures()}
    return found


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
        libraries[ext.name](directory, library)
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        command = [ninja(), *jobs, "-C", str(ROOT), "-f", str(directory / "build.ninja")]
        if subprocess.run(command, check=False).returncode:
            sys.exit(f"effattn: {ext.name} does not compile")


class BuildPython(build_py):
    """Adds the build information; an editable install has a checkout instead."""

    def run(self):
        super().run()
        if not self.editable_mode:
            version = self.distribution.get_version()
            build_info.write(Path(self.build_lib, "effattn", "_build.json"), version=version, **facts())
            for path in Path(self.build_lib).rglob("*.*"):
                if path.suffix != ".so" and path.is_file():
                    path.chmod(0o644)  # whatever the umask of the checkout was


class SourceArchive(sdist):
    """Adds the commit, which a wheel built of it could not ask git for."""

    def make_release_tree(self, base_dir, files):
        source = build_info.source()  # before there is a folder that git does not know
        super().make_release_tree(base_dir, files)
        Path(base_dir, build_info.SOURCE.relative_to(ROOT)).write_text(json.dumps(source) + "\n")


class AnyPythonWheel(bdist_wheel):
    """No CPython API inside: the tag names the platform only."""

    def get_tag(self):
        python, abi, system = super().get_tag()
        if platform.machine() != MACHINE:
            system = f"linux_{MACHINE}"
        return ("py3", "none", system) if self.distribution.has_ext_modules() else (python, abi, system)


# Metadata is asked for by separate runs of this file; only those that build look for a compiler and speak.
BUILDING = not {"bdist_wheel", "editable_wheel", "build", "build_ext", "install", "develop"}.isdisjoint(sys.argv)
lacking = unsupported()
libraries = {} if lacking else {"effattn._cpu": write_cpu_ninja}

if BUILDING and not lacking:
    if problem := missing():
        sys.exit(
            f"effattn: {problem[0]}. To build the compiled kernels: {problem[1]}, then pip install with --no-build-isolation.\n"
            "effattn: To install without them and run on plain PyTorch, much slower: set EFFATTN_NATIVE=0."
        )
    if wants_cuda():
        libraries["effattn._cuda"] = write_cuda_ninja

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
    ext_modules=[Extension(name, sources=[]) for name in libraries],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython, "bdist_wheel": AnyPythonWheel, "sdist": SourceArchive},
    options={"egg_info": {"tag_build": LOCAL_VERSION}},
    zip_safe=False,
)
