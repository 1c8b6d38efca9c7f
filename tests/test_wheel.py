"""What a wheel promises: libraries that any torch from 2.10 can load, the GPUs that were asked for, and a record of its making."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from effattn import _diagnostics, _native

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "packaging"))

import build_info  # noqa: E402, I001
import check_reproducible  # noqa: E402
import cuda_toolkit  # noqa: E402
import elf  # noqa: E402
import make_wheel  # noqa: E402


# ---- the libraries ----


@pytest.mark.parametrize("library", [_native.CPU_LIBRARY, _native.CUDA_LIBRARY], ids=lambda path: path.stem)
def test_of_torch_a_library_needs_only_the_stable_abi(library):
    if not library.exists():
        pytest.skip(f"{library.name} is not built")
    needed = elf.undefined(library)
    assert "torch_call_dispatcher" in needed
    assert elf.unstable(library) == []
    assert elf.exported(library) == []
    assert "libtorch.so" in elf.needed(library)  # brings libtorch_cuda.so, where the stream and the device are


def test_symbols_of_torch_outside_the_stable_abi_are_found(tmp_path):
    source = tmp_path / "unstable.cpp"
    source.write_text("""
        namespace at { void add(int); }
        namespace c10 { struct Error { Error(); }; }
        namespace std { void exported_unversioned_by_torch(); }
        extern "C" void aoti_torch_get_dim();
        void visible() { at::add(1); c10::Error error; std::exported_unversioned_by_torch(); aoti_torch_get_dim(); }
    """)
    library = tmp_path / "unstable.so"
    subprocess.run(["c++", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    assert elf.unstable(library) == ["_ZN2at3addEi", "_ZN3c105ErrorC1Ev", "_ZSt29exported_unversioned_by_torchv"]
    assert "_Z7visiblev" in elf.exported(library)


def test_versions_are_compared_by_number(monkeypatch):
    needed = {
        "a": "GLIBC_2.4",
        "b": "GLIBC_2.34",
        "c": "GLIBC_2.34",
        "d": "GLIBCXX_3.4.9",
        "e": "GLIBCXX_3.4.21",
        "f": None,
    }
    monkeypatch.setattr(elf, "undefined", lambda path: needed)
    assert elf.newest_versions("library.so") == {"GLIBC_2.34": ["b", "c"], "GLIBCXX_3.4.21": ["e"]}


# ---- the GPUs ----


@pytest.fixture
def nvcc(tmp_path):
    """A compiler of CUDA 12.4, as far as it is asked."""
    path = tmp_path / "bin" / "nvcc"
    path.parent.mkdir()
    path.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo "Cuda compilation tools, release 12.4, V12.4.131"; '
        "else printf 'sm_50\\nsm_80\\nsm_86\\nsm_89\\nsm_90\\n'; fi\n"
    )
    path.chmod(0o755)
    return str(path)


def test_a_release_is_for_the_gpus_that_its_compiler_knows(nvcc):
    assert cuda_toolkit.architectures("release", nvcc) == ["80+PTX", "86", "89", "90a"]
    assert cuda_toolkit.architectures(None, nvcc) == ["80+PTX", "90a"]


def test_an_asked_gpu_that_the_compiler_lacks_is_an_error(nvcc):
    assert cuda_toolkit.architectures("90a;80+PTX", nvcc) == ["90a", "80+PTX"]
    with pytest.raises(
        ValueError, match=r"=80;100: nvcc 12\.4\.131 does not compile for 100, only for 50, 80, 86, 89, 90$"
    ):
        cuda_toolkit.architectures("80;100", nvcc)


@pytest.mark.parametrize("asked", ["8.0", "80,90", "sm_80", "80;", "80+ptx", "90b", "all"])
def test_a_malformed_list_of_gpus_is_an_error_that_shows_the_form(asked, nvcc):
    with pytest.raises(ValueError, match=r'is no architecture; wanted "release" or a list such as "80\+PTX;90a;120"'):
        cuda_toolkit.architectures(asked, nvcc)


def test_options_of_nvcc_for_each_form():
    assert cuda_toolkit.gencode("80+PTX") == "arch=compute_80,code=[sm_80,compute_80]"
    assert cuda_toolkit.gencode("90a") == "arch=compute_90a,code=sm_90a"


def test_wheels_of_other_toolkits_have_a_version_of_their_own(nvcc, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    monkeypatch.delenv("EFFATTN_CUDA_ARCHITECTURES", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(Path(nvcc).parents[1]))
    for cuda in ("", "12"):
        settings = make_wheel.settings(cuda)
        assert (settings["EFFATTN_CUDA"], settings["EFFATTN_LOCAL_VERSION"]) == ("1", "cu12")
        assert settings["EFFATTN_CUDA_ARCHITECTURES"] == "release"
    assert make_wheel.settings("0")["EFFATTN_LOCAL_VERSION"] == "cpu"
    with pytest.raises(SystemExit, match=r"CUDA=13, but .*nvcc is of CUDA 12\.4\.131\. Set CUDA_HOME"):
        make_wheel.settings("13")


# ---- the record ----


def git(*arguments, cwd):
    identity = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.org")
    subprocess.run(["git", *identity, *arguments], cwd=cwd, check=True, capture_output=True)


def test_the_commit_is_that_of_this_tree_alone(tmp_path, monkeypatch):
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.setattr(build_info, "ROOT", project)
    assert build_info.source() == build_info.UNKNOWN
    git("init", "--quiet", cwd=tmp_path)  # a repository around the project is another's
    git("commit", "--quiet", "--allow-empty", "--message", "other", cwd=tmp_path)
    assert build_info.source() == build_info.UNKNOWN
    git("init", "--quiet", cwd=project)
    git("commit", "--quiet", "--allow-empty", "--message", "ours", "--date", "2026-01-02T03:04:05Z", cwd=project)
    source = build_info.source()
    assert (len(source["commit"]), source["dirty"]) == (40, False)
    (project / "new.py").write_text("")
    assert build_info.source() == source | {"dirty": True}


def test_an_archive_keeps_the_commit_of_its_maker(tmp_path):
    ran = setup("--quiet", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path)
    assert ran.returncode == 0, ran.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        (source,) = [name for name in content.getnames() if name.endswith("packaging/source.json")]
        assert json.load(content.extractfile(source))["commit"] == build_info.source()["commit"]


def test_info_shows_how_a_wheel_was_made(tmp_path, monkeypatch):
    record = {
        "commit": "0123456789abcdef",
        "date": 1767323045,
        "dirty": True,
        "libc": "glibc 2.28",
        "version": "0.1.0+cu12",
        "without": None,
        "torch": {"headers": "2.13.0", "oldest": "2.10"},
        "cpu": {"compiler": "g++ 14.2", "flags": "-O3", "levels": {"baseline": "", "avx2": "-march=x86-64-v3"}},
        "cuda": {"compiler": "nvcc 12.4.131", "flags": "-DUSE_CUDA", "architectures": ["80+PTX", "90a"]},
    }
    monkeypatch.setattr(_diagnostics, "_BUILD", tmp_path / "_build.json")
    monkeypatch.setattr(_diagnostics, "_platform_tag", lambda: "manylinux_2_28_x86_64")
    _diagnostics._BUILD.write_text(json.dumps(record))
    assert [line.strip() for line in _diagnostics._build().splitlines()] == [
        "wheel 0.1.0+cu12 for manylinux_2_28_x86_64, commit 0123456789abcdef of 2026-01-02, with uncommitted changes",
        "cpu   g++ 14.2 for baseline, avx2",
        "-O3",
        "cuda  nvcc 12.4.131 for 80+PTX, 90a",
        "-DUSE_CUDA",
        "torch 2.13.0 headers, 2.10 or later to run; glibc 2.28",
    ]


def test_info_shows_why_a_wheel_has_no_kernels(tmp_path, monkeypatch):
    record = build_info.UNKNOWN | {
        "version": "0.1.0",
        "without": "EFFATTN_NATIVE=0",
        "torch": None,
        "cpu": None,
        "cuda": None,
    }
    monkeypatch.setattr(_diagnostics, "_BUILD", tmp_path / "_build.json")
    _diagnostics._BUILD.write_text(json.dumps(record))
    shown = _diagnostics._build()
    assert "commit unknown\n" in shown
    assert shown.endswith("without compiled kernels: EFFATTN_NATIVE=0")


def setup(*arguments, before="pass", **environment):
    code = f"import sys; {before}; __file__ = 'setup.py'; sys.argv = {['setup.py', *map(str, arguments)]}; exec(open('setup.py').read())"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_build_that_sees_no_torch_fails_and_says_what_to_do():
    ran = setup("build_ext", before="sys.modules['torch'] = None")
    assert ran.returncode == 1
    assert ran.stderr.startswith(
        "effattn: torch is not visible to the build. To build the compiled kernels: pip install torch "
    )
    assert "EFFATTN_NATIVE=0" in ran.stderr


def test_a_wheel_without_kernels_says_why(tmp_path):
    paths = ("egg_info", "--egg-base", tmp_path, "build_py", "--build-lib", tmp_path)
    ran = setup("--quiet", *paths, before="sys.modules['torch'] = None", EFFATTN_NATIVE="0")
    assert ran.returncode == 0, ran.stderr
    made = json.loads((tmp_path / "effattn" / "_build.json").read_text())
    assert (made["without"], made["cpu"], made["cuda"]) == ("EFFATTN_NATIVE=0", None, None)
    assert made["commit"] == build_info.source()["commit"]


# ---- the same bytes twice ----


def test_what_tells_two_wheels_apart_is_named(tmp_path):
    for name, content in (("one", b"12"), ("other", b"34")):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(zipfile.ZipInfo("same.py", (2026, 1, 1, 0, 0, 0)), b"")
            archive.writestr(zipfile.ZipInfo("library.so", (2026, 1, 1, 0, 0, 0)), content)
            archive.writestr(zipfile.ZipInfo("late.py", (2026, 1, 1, 0, 0, 2 if name == "one" else 4)), b"")
            archive.writestr(f"only.{name}", b"")
    found = list(check_reproducible.differences(tmp_path / "one", tmp_path / "other"))
    assert found == [
        "only.one is only in one",
        "only.other is only in one",
        "late.py has date_time (2026, 1, 1, 0, 0, 2) and (2026, 1, 1, 0, 0, 4)",
        "library.so differs, 2 and 2 bytes",
    ]
