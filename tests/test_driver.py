"""What ``doctor`` says of NVIDIA drivers and GPUs, on drivers and GPUs that are made up."""

from __future__ import annotations

import json
import types

import pytest
import torch

from effattn import _diagnostics, _driver, _node_gpu
from effattn._driver import Build, Driver

WHEEL = Build((13, 0), ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120", "compute_80"))


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A function that makes this a machine with such a driver, as /proc, nvidia-smi and libcuda tell it."""

    def make(proc: str | None = None, smi: str | None = None, cuda: int | None = None):
        module = tmp_path / "version"
        if proc is not None:
            module.write_text(proc)
        monkeypatch.setattr(_driver, "_KERNEL_MODULE", module)
        monkeypatch.setenv("PATH", str(tmp_path))
        if smi is not None:
            (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{smi}'\n")
            (tmp_path / "nvidia-smi").chmod(0o755)

        class Library:
            @staticmethod
            def cuDriverGetVersion(version):
                version._obj.value = cuda
                return 0

        def load(name):
            assert name == "libcuda.so.1"
            if cuda is None:
                raise OSError("libcuda.so.1: cannot open shared object file")
            return Library

        monkeypatch.setattr(_driver.ctypes, "CDLL", load)

    return make


PROPRIETARY = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version: 12\n"
)
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs)  Sun Jul 27 06:54:38 2025\n"


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ({"proc": PROPRIETARY, "cuda": 12020}, Driver("535.104.05", (12, 2))),
        ({"proc": OPEN, "smi": "999.1", "cuda": 13000}, Driver("580.65.06", (13, 0))),
        ({"smi": "560.35.03", "cuda": 12060}, Driver("560.35.03", (12, 6))),
        ({"smi": "No devices were found"}, None),
        ({"proc": PROPRIETARY}, Driver("535.104.05", None)),
        ({"cuda": 12080}, Driver("", (12, 8))),
        ({"cuda": 0}, None),
        ({}, None),
    ],
)
def test_the_driver_is_read_without_torch(machine, seen, expected):
    machine(**seen)
    assert _driver.driver() == expected


@pytest.mark.parametrize(
    ("driver", "toolkit", "words"),
    [
        (Driver("580.65.06", (13, 0)), (13, 0), None),
        (Driver("580.65.06", (13, 0)), (13, 2), None),  # minor versions are compatible
        (Driver("580.65.06", (13, 0)), (12, 8), None),
        (Driver("525.60.13", (12, 0)), (12, 9), None),
        (Driver("535.104.05", (13, 0)), (13, 0), None),  # with cuda-compat
        (Driver("", (13, 0)), (13, 0), None),
        (Driver("575.57.08", (12, 9)), (13, 0), "driver 575.57.08 serves CUDA 12.9; X is built with CUDA 13.0 and needs driver 580 or newer"),
        (Driver("470.82.01", (11, 4)), (12, 8), "needs driver 525 or newer"),
        (Driver("535.104.05", None), (13, 0), "driver 535.104.05 is older"),
        (Driver("580.65.06", None), (13, 0), "libcuda.so.1 is not found"),
        (None, (13, 0), "no NVIDIA driver"),
        (Driver("580.65.06", (13, 0)), (14, 1), "X is built with CUDA 14.1"),
    ],
)  # fmt: skip
def test_a_driver_serves_the_generation_of_its_toolkit_and_older_ones(driver, toolkit, words):
    problem = _driver.driver_problem(driver, toolkit, "X")
    assert words in problem if words else problem == ""


def test_the_remedy_is_one_that_helps():
    def remedy(version, cuda, toolkit=(13, 0)):
        return _driver.driver_remedy(Driver(version, cuda), toolkit)

    assert "driver 580 or newer" in remedy("535.104.05", (12, 2))
    assert "+cu12" in remedy("535.104.05", (12, 2))
    assert "`CUDA=12 make wheel`" in remedy("535.104.05", None)
    assert "+cu12" not in remedy("470.82.01", (11, 4))  # too old for that one too
    assert "driver 525 or newer" in remedy("470.82.01", (11, 4), (12, 8))
    assert "+cu12" not in remedy("470.82.01", (11, 4), (12, 8))
    assert "--gpus all" in remedy("580.65.06", None)


@pytest.mark.parametrize(
    ("capability", "words"),
    [
        ((8, 0), None),
        ((8, 6), None),
        ((8, 9), None),
        ((9, 0), None),
        ((10, 3), None),  # sm_100's code
        ((12, 1), None),
        ((11, 0), None),  # PTX
        ((7, 5), "its compute capability 7.5 is below 8.0"),
    ],
)
def test_a_wheel_has_code_for_every_gpu_from_ampere_on(capability, words):
    problem = _driver.gpu_problem(capability, WHEEL, Driver("580.65.06", (13, 0)))
    assert words in problem if words else problem == ""


def test_code_for_one_architecture_alone_runs_on_no_other():
    hopper = Build((13, 0), ("sm_90a",))
    assert _driver.gpu_problem((9, 0), hopper, None) == ""
    assert "neither machine code nor PTX" in _driver.gpu_problem((10, 0), hopper, None)
    assert "neither machine code nor PTX" in _driver.gpu_problem((8, 0), WHEEL._replace(architectures=("sm_86",)), None)
    assert "neither machine code nor PTX" in _driver.gpu_problem((12, 0), Build((13, 0), ("compute_90a",)), None)


def test_ptx_needs_a_driver_as_new_as_the_toolkit():
    build = Build((12, 9), ("sm_80", "compute_80"))
    assert _driver.gpu_problem((9, 0), build, Driver("575.57.08", (12, 9))) == ""
    problem = _driver.gpu_problem((9, 0), build, Driver("525.60.13", (12, 0)))
    assert "only PTX" in problem
    assert "CUDA 12.9" in problem
    assert _driver.gpu_problem((8, 6), build, Driver("525.60.13", (12, 0))) == ""  # machine code


def test_gpus_of_a_kind_are_told_of_once():
    gpus = [("Tesla T4", (7, 5)), ("Tesla T4", (7, 5)), ("NVIDIA H100", (9, 0))]
    ((what, remedy),) = _driver.gpu_problems(gpus, WHEEL, None)
    assert what.startswith("Tesla T4 cannot run the CUDA kernels")
    assert "Triton" in remedy


def test_what_a_library_was_built_with_is_read_from_its_account(tmp_path):
    account = tmp_path / "_build.json"
    assert _driver.build(account) is None
    for broken in ("", "[]", "{}", '{"cuda": null}', '{"cuda": {"compiler": "new", "architectures": []}}'):
        account.write_text(broken)
        assert _driver.build(account) is None
    account.write_text(json.dumps({"cuda": {"compiler": "nvcc 12.9.86", "architectures": ["80+PTX", "90a"]}}))
    assert _driver.build(account) == Build((12, 9), ("sm_80", "compute_80", "sm_90a"))


def test_doctor_names_the_driver_that_torch_and_the_library_need(machine, monkeypatch, capsys):
    machine(proc=PROPRIETARY, cuda=12020)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_driver, "build", lambda: WHEEL)
    monkeypatch.setattr(_diagnostics, "_wrong_results", lambda: [])
    assert _diagnostics.doctor() == 1
    said = capsys.readouterr().out
    assert "problem: driver 535.104.05 serves CUDA 12.2; torch" in said
    assert (
        "problem: driver 535.104.05 serves CUDA 12.2; effattn/_cuda.so is built with CUDA 13.0 and needs driver 580"
        in said
    )
    assert "fix: install driver 580 or newer" in said
    assert "CUDA=12 make wheel" in said


def test_a_gpu_without_code_is_a_problem_of_the_machine_and_of_its_process(machine, monkeypatch):
    machine(proc=OPEN, cuda=13000)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_driver, "build", lambda: WHEEL)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def asked(index):
        return types.SimpleNamespace(name="Tesla T4", major=7, minor=5)

    monkeypatch.setattr(torch.cuda, "get_device_properties", asked)
    ((what, _),) = _diagnostics._code_problems()
    assert what.startswith("Tesla T4 cannot run the CUDA kernels")
    assert _node_gpu.code_problems("Tesla T4", (7, 5)) == [what]
    assert _node_gpu.code_problems("NVIDIA H100", (9, 0)) == []


def test_the_parent_of_the_nodes_processes_asks_no_gpu(machine, monkeypatch):
    """One that hangs would keep it from telling so."""
    machine(proc=OPEN, cuda=13000)

    def touched(*arguments):
        raise AssertionError("touched a GPU")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", touched)
    monkeypatch.setattr(torch.cuda, "_lazy_init", touched)
    monkeypatch.setattr(_driver, "build", lambda: WHEEL)
    _diagnostics._installation_problems()


def test_torch_of_another_generation_is_a_remark_and_no_problem(machine, monkeypatch, capsys):
    machine(proc=OPEN, cuda=13000)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(_driver, "build", lambda: WHEEL)
    for other in ("_wrong_results", "_library_problems"):
        monkeypatch.setattr(_diagnostics, other, lambda: [])
    assert _diagnostics.doctor() == 0
    assert "torch is built with CUDA 12.8, the kernels with 13.0" in capsys.readouterr().out
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    assert _diagnostics.doctor() == 0
    assert "the kernels with" not in capsys.readouterr().out


def test_doctor_is_silent_about_drivers_where_there_is_none(machine, monkeypatch, capsys):
    machine()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert list(_diagnostics._driver_problems()) == []


def test_doctor_asks_the_library_where_the_build_left_no_account(machine, monkeypatch):
    machine(proc=PROPRIETARY, cuda=12020)
    monkeypatch.setattr(torch.version, "cuda", "12.2")
    monkeypatch.setattr(_driver, "build", lambda: None)
    monkeypatch.setattr(_diagnostics._native, "cuda_loaded", True)
    monkeypatch.setattr(_diagnostics._native, "cuda_device", "cuda")
    library = torch.library.Library("effattn", "FRAGMENT")
    library.define("cuda_toolkit() -> int")
    library.impl("cuda_toolkit", lambda: 13010, "CompositeExplicitAutograd")
    ((what, _),) = _diagnostics._driver_problems()
    assert "built with CUDA 13.1" in what
    library._destroy()
