"""The re-run of the published kernel benchmark: its shapes, its checks, its sums."""

from __future__ import annotations

import json

import pytest
import torch
from effattn.bench import shift_add_honesty as honesty
from effattn.bench.runner import Effort, Result

FAST = Effort(0.02, 3, 3)
SMALL = [
    pytest.param(honesty.matshift("MatShift", 12, 64, 32, "small"), id="MatShift"),
    pytest.param(honesty.matadd(2, 3, 40, 8, 16), id="MatAdd"),
]


def test_the_published_shapes_are_all_there():
    operations = {(problem.kind, problem.operations) for problem in honesty.problems()}
    for batch in (1, 32):
        for rows, columns, outputs in ((3136, 64, 512), (3136, 512, 64), (784, 128, 1024), (784, 1024, 128)):
            assert ("MatShift", batch * rows * columns * outputs) in operations
        for heads, tokens in ((1, 3136), (2, 784), (5, 196)):
            assert ("MatAdd", batch * heads * tokens * 32 * 16) in operations
    assert [p.rows for p in honesty.problems() if p.kind == "token by token"] == [1, 4, 16, 64, 256]


@pytest.mark.parametrize("problem", SMALL)
def test_every_contender_computes_the_problem(problem):
    for contender in problem.prepare("cpu"):
        assert honesty._admit(contender, "cpu")[0] == "", contender.name
        assert contender.answer is not None or contender.name.startswith("weights")


def test_cold_weights_are_copies_in_turn_and_compute_the_same(monkeypatch):
    monkeypatch.setattr(honesty, "COLD_BYTES", 8 * 4 * 64 * 32)
    for contender in honesty.matshift("", 3, 64, 32, "", cold=True).prepare("cpu"):
        sets = [next(contender.call.args[2]) for _ in range(4)]
        assert len({id(weights[0]) for weights in sets}) == 4, contender.name
        assert all(torch.equal(a, b) for weights in sets for a, b in zip(weights, sets[0]))
        assert sum(tensor.nbytes for tensor in sets[0]) == contender.weights
        assert honesty._admit(contender, "cpu")[0] == ""


def test_a_contender_that_is_wrong_is_not_timed():
    (right,) = (c for c in SMALL[0].values[0].prepare("cpu") if c.name == "linear fp32")
    wrong = right._replace(call=lambda: right.call() + 1)
    problem = honesty.Problem("MatShift", "", 12, 1, lambda device: iter([right, wrong._replace(name="off")]))
    lines = {line.contender.name: line.result for line in honesty.measure(problem, FAST, "cpu")}
    assert lines["linear fp32"].ms > 0
    assert lines["off"].note.startswith("wrong")
    assert lines["off"].ms == 0


def test_four_bit_weights_are_an_eighth_of_float32_and_memory_is_charged_once():
    problem = SMALL[0].values[0]
    contenders = {contender.name: contender for contender in problem.prepare("cpu")}
    shift, dense = contenders["shift 4-bit fp32"], contenders["linear fp32"]
    assert shift.weights * 8 == dense.weights == 4 * 64 * 32
    assert dense.traffic == 4 * (64 * 32 + 12 * 64 + 12 * 32)
    arithmetic, whole = honesty.energy(problem, dense)
    assert arithmetic == pytest.approx(12 * 64 * 32 * (3.7 + 0.9) * 1e-6)
    assert whole - arithmetic == pytest.approx(dense.traffic * 162.5e-6)
    assert honesty.energy(problem, shift)[0] == pytest.approx(12 * 64 * 32 * (0.13 + 0.9) * 1e-6)


def test_the_crossover_is_the_first_number_of_rows_that_loses():
    def found(rows, ours, rival):
        def line(name, ms, against=""):
            return honesty.Line(honesty.Contender(name, torch.empty, 1, 1, 1.0, against), Result(ms=ms))

        problem = honesty.Problem("token by token", "", rows, 1, iter)
        return problem, [line("ours", ours, "rival"), line("rival", rival)]

    assert honesty.crossovers([found(64, 2, 1), found(1, 1, 4), found(256, 9, 2)]) == {"ours": 64}
    assert honesty.crossovers([found(1, 1, 4)]) == {"ours": None}
    assert honesty.ratio(found(1, 1, 4)[1], found(1, 1, 4)[1][0]) == 4


def test_the_command_prints_a_table_and_writes_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(honesty, "problems", lambda: [parameter.values[0] for parameter in SMALL])
    monkeypatch.setattr(honesty, "QUICK", FAST)
    file = tmp_path / "out.json"
    threads = torch.get_num_threads()
    assert honesty.main(["--quick", "--json", str(file), "--threads", str(threads)]) == 0
    printed = capsys.readouterr().out
    assert "shift 4-bit bf16" in printed
    assert "Estimates, not measurements" in printed
    written = json.loads(file.read_text())
    assert [problem["kind"] for problem in written["problems"]] == ["MatShift", "MatAdd"]
    assert written["assumptions"]["dram_pj_per_byte"] == 162.5
    assert all(contender["ms"] for problem in written["problems"] for contender in problem["contenders"])


@pytest.mark.parametrize("arguments", [["--case", "no such"], ["--threads", "0"], ["--device", "cuda"]])
def test_arguments_that_fit_nothing_are_refused(arguments, capsys):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit):
        honesty.main(arguments)
    assert capsys.readouterr().err
