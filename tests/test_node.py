"""``doctor --gpu``: the checks on emulated kernels, and the node's verdict on GPUs whose processes are made up."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch

from effattn import _diagnostics, _native, _node, _node_gpu, _registry
from effattn.__main__ import main

LATER = 1e9  # seconds from now


def check(*operators, deadline=LATER):
    return _node_gpu.check_results("cpu", time.monotonic() + deadline, operators)


def serves(backend):
    return [op for op in _registry.operators() if backend in _node_gpu._served(op, "cpu")]


# ---- one GPU ----


@pytest.mark.parametrize("of", ["cuda", "triton"])
def test_every_kernel_has_something_to_check(of):
    from effattn.bench.accuracy import PROBLEMS

    known = {problem.operator for problem in PROBLEMS} | set(_node_gpu.EXACT)
    assert set(serves(of)) <= known
    if of == "triton":  # whose interpreter, and so this test, takes small ones only
        known = {problem.operator for problem in PROBLEMS if problem.small} | set(_node_gpu.EXACT)
        assert set(serves(of)) <= known


def test_right_kernels_agree():
    found = check("TokenMerge.merge", "bipartite_soft_matching")
    assert found["failures"] == []
    assert found["agreed"] == sum(op in serves(b) for b in ("cuda", "triton") for op in ("TokenMerge.merge", "bipartite_soft_matching"))  # fmt: skip


def test_emulated_kernels_agree():
    if not _native.cuda_loaded:
        pytest.skip(_native.cuda_problem)
    wrong = [text for op in ("retention_step", "shift_linear", "pack_signs", "binary_matmul", "add_matmul") for text in _node_gpu.disagreements(op, "cuda")]  # fmt: skip
    assert wrong == []


def test_a_toeplitz_product_is_checked_with_the_method_that_cuda_has():
    if not _native.cuda_loaded:
        pytest.skip(_native.cuda_problem)
    shapes = {entry.shape for entry in _node_gpu._entries("toeplitz_linear_attention", "cuda", torch.float32)}
    assert all("fft" in shape for shape in shapes)


def test_wrong_numbers_are_told_by_operator_backend_dtype_and_tensor(monkeypatch):
    from effattn.bench import accuracy

    (problem,) = [p for p in accuracy.PROBLEMS if p.operator == "TokenMerge.merge" and p.small]
    off = problem._replace(call=lambda tensors, backend: problem.call(tensors, backend) * 1.5)
    monkeypatch.setattr(accuracy, "PROBLEMS", (off,))
    failures = check("TokenMerge.merge")["failures"]
    assert any(f.startswith("TokenMerge.merge on triton, float32, output: error ") for f in failures)
    assert any(f.startswith("TokenMerge.merge on triton, bfloat16, grad_x: error ") for f in failures)


def test_wrong_bits_are_counted(monkeypatch):
    def matched(device, backend):
        return (torch.arange(5) + torch.tensor([0, 0, 1, 1, 0]) * (backend == "triton"),)

    monkeypatch.setitem(_node_gpu.EXACT, "bipartite_soft_matching", matched)
    assert "bipartite_soft_matching on triton: 2 of 5 numbers differ" in check("bipartite_soft_matching")["failures"]


def test_after_a_cuda_error_nothing_more_is_asked_of_the_gpu(monkeypatch):
    asked = []

    def broken(op, backend):
        asked.append(op)
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")

    monkeypatch.setattr(_node_gpu, "disagreements", broken)
    failures = check("soft_merge", "retention")["failures"]
    assert len(asked) == 1
    assert failures[0].endswith("fails: CUDA error: an illegal memory access was encountered")


def test_another_error_does_not_hide_the_rest(monkeypatch):
    def broken(op, backend):
        raise RuntimeError(f"PTX of {op} is unsupported")

    monkeypatch.setattr(_node_gpu, "disagreements", broken)
    failures = check("soft_merge", "urpe_attention")["failures"]
    assert {"soft_merge on triton fails: PTX of soft_merge is unsupported", "urpe_attention on triton fails: PTX of urpe_attention is unsupported"} <= set(failures)  # fmt: skip


def test_what_the_deadline_cut_off_is_no_success():
    (failure,) = check("soft_merge", "urpe_attention", deadline=-1.0)["failures"]
    assert "not checked for lack of time (" in failure
    assert "soft_merge on triton" in failure


def test_nothing_that_serves_the_gpu_is_no_success(monkeypatch):
    monkeypatch.setattr(_node_gpu, "_served", lambda op, device: set())
    assert check("soft_merge")["failures"] == ["no CUDA or Triton kernel serves it"]


@pytest.mark.parametrize(("count", "parts"), [(1, 1), (1, 4), (8, 1), (8, 3), (3, 40)])
def test_the_parts_of_a_gpu_are_all_operators(count, parts):
    operators = _registry.operators()
    for index in range(count):
        mine = [_node_gpu.share(operators, index, count, part, parts) for part in range(parts)]
        assert sorted(sum(mine, ())) == sorted(operators)


def test_gpus_begin_at_different_operators():
    assert len({_node_gpu.share(_registry.operators(), index, 8, 0, 1)[0] for index in range(8)}) == 8


def test_speed_is_work_over_time(monkeypatch):
    monkeypatch.setattr(_node_gpu, "_fastest", lambda call, device: call() is None or 0.5)
    found = _node_gpu.speed(torch.device("cpu"), copied=10**6, multiplied=100)
    assert found == pytest.approx({"copy_gb_per_s": 2e6 / 0.5 / 1e9, "matmul_tflop_per_s": 2e6 / 0.5 / 1e12})
    monkeypatch.undo()
    assert all(value > 0 for value in _node_gpu.speed(torch.device("cpu"), copied=10**6, multiplied=100).values())


# ---- the node ----

GOOD = {
    "name": "NVIDIA H100",
    "uuid": "GPU-1",
    "capability": "9.0",
    "copy_gb_per_s": 2500.0,
    "matmul_tflop_per_s": 700.0,
    "agreed": 40,
    "failures": [],
    "seconds": 9.0,
}


@pytest.fixture
def node(monkeypatch, tmp_path, capsys):
    """A function that checks a node whose GPUs' processes are this Python code: (status, printed, written)."""

    def run(*codes, seconds=20.0, cores=1, installation=()):
        monkeypatch.setattr(_node, "_command", lambda index, *more: [sys.executable, "-c", codes[index], str(more[-1])])
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(codes))
        monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # which the command sets for its own process
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(cores), raising=False)
        monkeypatch.setattr(_diagnostics, "_installation_problems", lambda: list(installation))
        report = tmp_path / "reports" / "node.json"
        status = main(["doctor", "--gpu", "--seconds", str(seconds), "--json", str(report)])
        return status, capsys.readouterr().out, json.loads(report.read_text())

    return run


def says(**changes):
    return f"print({json.dumps({**GOOD, **changes})!r})"


def test_good_gpus_are_a_line_each_and_status_0(node):
    status, printed, written = node(says(), says(uuid="GPU-2"))
    assert status == 0
    assert "GPU 1: NVIDIA H100 (9.0) GPU-2: 40 results agree; 2500 GB/s copied, 700 TFLOP/s bfloat16; 9 s" in printed
    assert "2 GPUs checked" in printed
    assert (written["status"], written["problems"]) == (0, [])
    assert [gpu["uuid"] for gpu in written["gpus"]] == ["GPU-1", "GPU-2"]


def test_a_wrong_result_fails_the_node_and_names_the_gpu(node):
    status, printed, written = node(says(), says(failures=["soft_merge on cuda is wrong"]))
    assert status == 1
    assert "problem: GPU 1: soft_merge on cuda is wrong" in printed
    assert "1 FAILED" in printed
    assert written["problems"] == ["GPU 1: soft_merge on cuda is wrong"]


def test_a_gpu_that_hangs_is_killed_at_the_deadline_and_the_others_are_told(node):
    begin = time.monotonic()
    status, printed, _ = node("import time; time.sleep(100)", says(), seconds=3.0)
    assert time.monotonic() - begin < 30
    assert status == 1
    assert "problem: GPU 0: no answer before the deadline" in printed
    assert "GPU 1: NVIDIA H100" in printed


def test_the_deadline_that_a_process_is_given_is_the_parents(node):
    code = "import sys, time, json; left = float(sys.argv[-1]) - time.monotonic();"
    status, printed, _ = node(code + f"print(json.dumps({GOOD!r} | {{'seconds': left}}))", seconds=50.0)
    assert status == 0
    assert 40 < float(re.search(r"([\d.]+) s$", printed.splitlines()[0])[1]) <= 50


def test_a_process_that_dies_is_told_with_its_last_words(node):
    status, printed, _ = node("import sys; print('x', file=sys.stderr); sys.exit('no kernel image')", says())
    assert status == 1
    assert "problem: GPU 0: its process ended with status 1: no kernel image" in printed


def test_the_parts_of_a_gpu_are_counted_together(node):
    status, printed, written = node(says(), cores=3)
    assert status == 0
    assert "120 results agree" in printed
    assert len(written["gpus"]) == 1


def test_a_slow_gpu_among_its_like_is_a_problem(node):
    status, printed, _ = node(says(), says(), says(copy_gb_per_s=2000.0))
    assert status == 1
    assert "problem: GPU 2: 2000 GB/s copied where the node's GPUs have 2500" in printed


def test_gpus_of_another_name_and_gpus_alone_are_no_outliers():
    h100, t4 = {"index": 0, **GOOD}, {"index": 1, **GOOD, "name": "Tesla T4", "copy_gb_per_s": 250.0}
    assert _node.outliers([h100, t4]) == []
    assert _node.outliers([h100, {"index": 1, **GOOD, "copy_gb_per_s": 2200.0}]) == []  # within the margin
    unmeasured = {key: value for key, value in GOOD.items() if key not in _node.FIGURES}
    assert _node.outliers([h100, {"index": 1, **unmeasured}, {"index": 2, "failures": []}]) == []
    assert len(_node.outliers([h100, {"index": 1, **GOOD, "matmul_tflop_per_s": 500.0}])) == 1


def test_a_problem_of_the_installation_fails_a_node_of_good_gpus(node):
    status, printed, written = node(says(), installation=[("triton is missing", "pip install triton")])
    assert status == 1
    assert "problem: triton is missing\n    fix: pip install triton" in printed
    assert printed.count("triton is missing") == 1
    assert written["problems"] == ["triton is missing"]


def test_a_node_without_a_gpu_is_said_to_have_none(node):
    status, printed, written = node()
    assert status == 2
    assert "problem: no GPU: this torch is built without CUDA" in printed
    assert written["gpus"] == []


def test_a_gpu_that_torch_does_not_see_has_a_reason(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_node._driver, "driver", lambda: None)
    assert "there is no NVIDIA driver" in _node._why_none()
    monkeypatch.setattr(_node._driver, "driver", lambda: _node._driver.Driver("535.104.05", (12, 2)))
    assert "needs driver 580" in _node._why_none()
    monkeypatch.setattr(_node._driver, "driver", lambda: _node._driver.Driver("580.65.06", (13, 0)))
    assert "CUDA_VISIBLE_DEVICES" in _node._why_none()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a process that finds its GPU")
def test_the_process_of_a_gpu_that_is_not_there_says_so():
    ran = subprocess.run(
        _node._command(0, 1, 0, 1, time.monotonic() + 60), capture_output=True, text=True, check=False, timeout=120
    )
    assert ran.returncode == 1
    assert ran.stderr.strip()


@pytest.mark.gpu
def test_this_gpu_is_good(tmp_path):
    """Shown by the command itself, as on a node."""
    report = tmp_path / "node.json"
    assert main(["doctor", "--gpu", "--seconds", "300", "--json", str(report)]) == 0, report.read_text()


@pytest.mark.parametrize("arguments", [["--json", "x"], ["--seconds", "5"], ["--gpu", "--seconds", "0"], ["more"]])
def test_doctor_refuses_what_it_does_not_know(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", *arguments])
    assert stopped.value.code == 2
    assert "usage: python -m effattn doctor" in capsys.readouterr().err
