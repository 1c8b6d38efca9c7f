"""The command line, and an installation whose compiled library is missing or broken."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conformance import skip_level_of_other_tests

import effattn
from effattn import _native, _registry
from effattn._registry import REFERENCE, Backend, Problem

PACKAGE = Path(effattn.__file__).parent


def cli(*arguments, cwd, **environment):
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "EFFATTN_BACKEND", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**clean, "PYTHONPATH": str(cwd), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def python(code, cwd, **environment):
    return cli("-c", code, cwd=cwd, **environment)


@pytest.fixture(scope="session")
def bare(tmp_path_factory):
    """A copy of the installed package without its compiled library."""
    root = tmp_path_factory.mktemp("bare")
    shutil.copytree(PACKAGE, root / "effattn", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return root


@pytest.fixture(scope="session")
def broken(bare, tmp_path_factory):
    """The same with a library that is none."""
    root = tmp_path_factory.mktemp("broken")
    shutil.copytree(bare / "effattn", root / "effattn")
    (root / "effattn" / "_cpu.so").write_bytes(b"\x7fELF and then nothing")
    return root


# ---- python -m effattn ----


def test_info_tells_what_is_here():
    shown = cli("-m", "effattn", "info", cwd=PACKAGE.parent)
    assert shown.returncode == 0, shown.stderr
    for fact in (effattn.__version__, torch.__version__, str(PACKAGE), *_registry.operators()):
        assert fact in shown.stdout
    assert re.search(r"^triton +\d", shown.stdout, re.MULTILINE)
    assert ("kernels" in shown.stdout) == _native.loaded


def test_info_shows_settings_that_change_what_runs():
    shown = cli("-m", "effattn", "info", cwd=PACKAGE.parent, EFFATTN_BACKEND="reference", TRITON_INTERPRET="1")
    assert "EFFATTN_BACKEND=reference" in shown.stdout
    assert "TRITON_INTERPRET=1" in shown.stdout


@pytest.mark.parametrize("state", ["bare", "broken"])
def test_info_without_the_library_names_the_command_that_builds_it(state, request):
    root = request.getfixturevalue(state)
    shown = cli("-m", "effattn", "info", cwd=root)
    assert shown.returncode == 0, shown.stderr
    assert {"bare": "_cpu.so is missing", "broken": "_cpu.so does not load"}[state] in shown.stdout
    assert re.search(rf"{re.escape(sys.executable)} -m pip install .*--no-build-isolation", shown.stdout)
    for op in _registry.operators():
        assert re.search(rf"{op} on cpu: .*cpu no.*reference yes", shown.stdout)


def test_doctor_finds_nothing_wrong_here():
    if not _native.loaded:
        pytest.skip(_native.problem)
    shown = cli("-m", "effattn", "doctor", cwd=PACKAGE.parent)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "nothing wrong" in shown.stdout


@pytest.mark.parametrize("state", ["bare", "broken"])
def test_doctor_fails_with_the_command_that_mends_it(state, request):
    shown = cli("-m", "effattn", "doctor", cwd=request.getfixturevalue(state))
    assert shown.returncode == 1, shown.stderr
    problem, fix = shown.stdout.splitlines()[:2]
    assert problem.startswith("problem: the compiled extension effattn/_cpu.so")
    assert re.match(rf"    fix: .*{re.escape(sys.executable)} -m pip install .*--no-build-isolation", fix)


def test_doctor_tells_a_backend_that_does_not_exist():
    shown = cli("-m", "effattn", "doctor", cwd=PACKAGE.parent, EFFATTN_BACKEND="tpu")
    assert shown.returncode == 1
    assert "EFFATTN_BACKEND=tpu names no backend" in shown.stdout
    assert "fix: unset EFFATTN_BACKEND" in shown.stdout


def test_doctor_finds_a_kernel_that_computes_something_else(bare):
    sabotage = (
        "import effattn, torch; from effattn import _diagnostics, _native, _registry, ops;"
        "_native.loaded = True;"
        "L = torch.library.Library('effattn', 'IMPL');"
        "L.impl('gaussian_mixture_fwd', lambda q, *a: (q + 1, q[..., 0].clone()), 'CPU');"
        "L.impl('gaussian_mixture_bwd', lambda g, *a: tuple(map(torch.zeros_like, a[:5])), 'CPU');"
        "_native.isa = lambda: 'sabotaged';"
        "raise SystemExit(_diagnostics.doctor())"
    )
    shown = python(sabotage, bare)
    assert shown.returncode == 1, shown.stderr
    assert "problem: backend cpu on cpu is wrong by" in shown.stdout


@pytest.mark.parametrize("arguments", [["nonsense"], [], ["info", "more"]], ids=str)
def test_command_line_refuses_what_it_does_not_know(arguments):
    shown = cli("-m", "effattn", *arguments, cwd=PACKAGE.parent)
    assert shown.returncode == 2
    assert "usage: python -m effattn" in shown.stderr


# ---- a package without its library ----

CALL = (
    "import torch, effattn;"
    "q = torch.randn(1, 2, 12, 8, requires_grad=True);"
    "a = torch.ones(3, 2);"
    "o = effattn.gaussian_mixture_attention(q, q, q, a, a, (3, 4){}); o.sum().backward();"
    "print(effattn._native.loaded, q.grad.isfinite().all().item())"
)


@pytest.mark.parametrize("state", ["bare", "broken"])
def test_package_without_the_library_imports_in_silence(state, request):
    ran = python("import effattn", request.getfixturevalue(state))
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


@pytest.mark.parametrize("state", ["bare", "broken"])
def test_package_without_the_library_computes_and_warns_once(state, request):
    ran = python(CALL.format("") + ";" + CALL.format(""), request.getfixturevalue(state))
    assert (ran.returncode, ran.stdout) == (0, "False True\n" * 2)
    (warning,) = ran.stderr.splitlines()
    assert warning.startswith("gaussian_mixture_attention runs on the reference")


@pytest.mark.parametrize("state", ["bare", "broken"])
def test_package_without_the_library_refuses_an_explicit_cpu_backend(state, request):
    ran = python(CALL.format(", backend='cpu'"), request.getfixturevalue(state))
    assert ran.returncode == 1
    assert "NotImplementedError: gaussian_mixture_attention: backend='cpu' cannot serve this call" in ran.stderr
    assert "python -m effattn doctor" in ran.stderr


def test_package_without_the_library_logs_the_reason_once(bare):
    code = "import logging; logging.basicConfig(level=logging.INFO, format='%(name)s %(levelname)s %(message)s');"
    ran = python(code + CALL.format("") + ";" + CALL.format(""), bare)
    assert ran.returncode == 0
    lines = [line for line in ran.stderr.splitlines() if line.startswith("effattn WARNING")]
    assert len(lines) == 1
    assert "gaussian_mixture_attention runs on the reference" in lines[0]
    assert "_cpu.so is missing" in lines[0]


# ---- every level of instruction set computes the same operator ----


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set_keeps_the_accuracy_rule(level):
    if not _native.loaded:
        pytest.skip(_native.problem)
    skip_level_of_other_tests(level)
    environment = {"EFFATTN_CPU_ISA": level}
    chosen = python("import effattn; print(effattn._native.isa())", PACKAGE.parent, **environment)
    if chosen.stdout.strip() != level:
        pytest.skip(f"this CPU runs {chosen.stdout.strip()} where {level} is asked for")
    # Tails and more than one tile; the other corners are decided before a vector is loaded.
    selection = "cpu and test_accuracy_in_corner_cases and (class or tile) and not -float16"
    if level.startswith("avx512") and _native.isa() == "avx512_bf16":
        selection = f"bfloat16 and {selection}"  # other dtypes have the same kernels at both levels
    tests = Path(__file__).with_name("test_conformance.py")
    ran = cli(
        "-m", "pytest", str(tests), "-q", "-k", selection, "-p", "no:cacheprovider", cwd=PACKAGE.parent, **environment
    )
    assert ran.returncode == 0, ran.stdout[-3000:]
    assert re.search(r"^\d{2,} passed", ran.stdout, re.MULTILINE)


# ---- the table itself ----


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(_registry, "_table", {})
    return _registry


def test_auto_takes_the_first_backend_that_can_and_wants_to(table):
    def refuses(problem):
        return False, "it is Sunday"

    def accepts(problem):
        return True, "why not"

    problem = Problem("cpu", torch.float32, 8)
    table.register(
        "op", (Backend("cuda", refuses), Backend("triton", accepts, refuses), Backend("cpu", accepts), REFERENCE)
    )
    assert table.choose("op", "auto", problem) == "cpu"
    assert table.choose("op", "triton", problem) == "triton"  # asked for: whether it pays is the caller's business
    with pytest.raises(NotImplementedError, match=r"it is Sunday\. Others: triton: ok; cpu: ok; reference: ok"):
        table.choose("op", "cuda", problem)


def test_one_predicate_gives_choice_error_and_explanation(table, capsys):
    calls = []

    def watched(problem):
        calls.append(problem)
        return False, f"no kernel for head_dim {problem.head_dim}"

    table.register("op", (Backend("cpu", watched), REFERENCE))
    problem = Problem("cpu", torch.float32, 77)
    assert table.choose("op", "auto", problem) == "reference"
    with pytest.raises(NotImplementedError, match="no kernel for head_dim 77"):
        table.choose("op", "cpu", problem)
    effattn.explain(lambda: table.choose("op", "auto", problem))
    assert "no kernel for head_dim 77" in capsys.readouterr().out
    assert len(calls) >= 3
    assert {id(p) for p in calls} == {id(problem)}


def test_explain_in_one_thread_does_not_stop_calls_in_another(table):
    from concurrent.futures import ThreadPoolExecutor

    table.register("op", (REFERENCE,))
    problem = Problem("cpu", torch.float32, 8)

    def outer():
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(table.choose, "op", "auto", problem).result() == "reference"
        table.choose("op", "auto", problem)

    assert effattn.explain(outer).backend == "reference"
