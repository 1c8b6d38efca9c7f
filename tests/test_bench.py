"""The benchmark itself: what it measures is what it says, and it leaves nothing half written."""

import dataclasses
import itertools
import json
import platform
import statistics
import time

import pytest
import torch
from effattn.bench import (
    accuracy,
    asked,
    ceilings,
    cli,
    memory,
    overhead,
    photographs,
    report,
    runner,
    toeplitz_peers,
)
from effattn.bench.cases import BACKWARD, FORWARD, OURS, Contender, families, flops

from effattn import reference

CASES = [
    pytest.param(family, case, id=f"{case.operator} {case.name}")
    for family in families().values()
    for case in family.cases
]


def small(case):
    """The same case on a few tokens."""
    if case.window:
        side = 4 if case.grid == (case.window, case.window) else 8
        return dataclasses.replace(case, batch=2, heads=4, head_dim=8, grid=(side, side), tokens=side**2, window=4)
    grid = (3, 4) if case.grid else ()
    tokens = 1 if case.operator == "retention_step" else case.num_prefix_tokens + 12
    one_layer = case.operator == "linear" or case.output_tokens > 0
    outputs = 0 if not case.outputs else 10 if one_layer or tokens == 1 else tokens
    batch, heads = (1, 1) if one_layer else (2, 3)
    sizes = {"head_dim": 8, "tokens": tokens, "outputs": outputs, "output_tokens": 9 if case.output_tokens else 0}
    return dataclasses.replace(case, batch=batch, heads=heads, grid=grid, **sizes)


@pytest.mark.parametrize(("family", "case"), CASES)
@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_every_contender_computes_the_case(family, case, direction):
    case = small(case)
    operator = family.operators[case.operator]
    inputs = operator.inputs(case, torch.float32, "cpu").leaves(gradients=direction == BACKWARD)
    heads, expected = operator.expected(case, inputs)
    assert heads == list(range(case.heads))
    for contender in operator.contenders:
        if contender.exact and not contender.compiles and (contender.trains or direction == FORWARD):
            output = runner.prepare(contender, case, inputs, direction)()
            torch.testing.assert_close(output.detach().double(), expected, rtol=1e-4, atol=1e-5)


def test_a_contender_that_is_wrong_is_not_timed():
    family = families()["attention"]
    case = small(next(case for case in family.cases if case.operator == "plain"))
    off = Contender("off", lambda case, inputs, training: lambda: inputs.value + 1)
    family = family._replace(operators={"plain": family.operators["plain"]._replace(contenders=(off,))})
    row = runner.run_row(family, case, torch.float32, FORWARD, runner.QUICK)
    assert row.results["off"].note.startswith("wrong")
    assert row.results["off"].ms == 0.0


def test_a_row_has_ratios_memory_and_errors():
    family = families()["gaussian_mixture"]
    row = runner.run_row(
        family, small(family.cases[0]), torch.float32, BACKWARD, runner.Effort(0.05, 4, 3), only=(OURS, "eager")
    )
    ours, eager = row.results[OURS], row.results["eager"]
    assert ours.samples >= 3
    assert ours.quartiles[0] <= ours.ms <= ours.quartiles[1]
    assert row.ratio("eager") == pytest.approx(eager.ms / ours.ms)
    assert row.ratio("flex") is None
    assert ours.error < 1e-4


def _row_of(case, direction=FORWARD, **ms):
    family = families()["retention"]
    results = {OURS if name == "ours" else name: runner.Result(ms=value) for name, value in ms.items()}
    return runner.Row("retention", case, torch.float32, direction, flops(family, case, direction), 6e6, results)


def _report_of(rows):
    limits = ceilings.Ceilings(2, 10e9, 0.0, 0.0, 0.0, dict.fromkeys(ceilings.KINDS, ""))
    return report.Report({}, limits, rows, {}, None, True, None)


def test_retention_step_is_held_to_its_share_of_the_copy_bandwidth():
    case = next(c for c in families()["retention"].cases if c.operator == "retention_step" and c.asked)
    rows = [_row_of(case, ours=1.0, **{"ours inplace": 2.0})]
    figures = [f for f in asked._retention_figures(_report_of(rows)) if "copy bandwidth" in f.what]
    assert [(f.measured, f.met) for f in figures] == [(pytest.approx(0.6), True), (pytest.approx(0.3), False)]


def test_growth_of_retention_is_that_from_one_length_to_its_double(monkeypatch):
    cases = [c for c in families()["retention"].cases if c.operator == "doubling"]
    assert [b.tokens / a.tokens for a, b in itertools.pairwise(cases)] == [2.0] * (len(cases) - 1)
    monkeypatch.setattr(asked.memory, "in_own_process", lambda family, case, *rest: case.tokens**2)
    rows = [_row_of(case, ours=float(case.tokens)) for case in cases]
    figures = asked._doubling_figures(_report_of(rows))
    measured = {f.what: (f.measured, f.met) for f in figures}
    assert measured["time, retention forward, N=4096 -> 8192: grows"] == (2.0, True)
    assert measured["extra memory, retention forward, N=16384 -> 32768: grows"] == (4.0, False)
    assert measured["time, retention forward+backward, N=4096 -> 8192: grows"] == (None, None)


def test_kernelized_attention_is_held_to_its_best_method_and_to_its_growth():
    family = families()["toeplitz"]
    cases = [c for c in family.cases if c.asked and c.operator.endswith(("kernelized_rpe", "long"))]
    assert [c.tokens for c in cases] == [512, 1024, 4096, 16384, 65536]
    rows = []
    for case in cases:
        ms = {OURS: case.tokens, "ours direct": case.tokens / 1.25, "ours fft": 2 * case.tokens, "torch.fft": 1e6}
        results = {
            name: runner.Result(ms=value, memory=1 if name == OURS else 20 if name == "torch.fft" else 3)
            for name, value in ms.items()
        }
        rows.append(runner.Row("toeplitz", case, torch.float32, FORWARD, 1.0, 1.0, results))
    measured = {f.what: (f.measured, f.met) for f in asked._toeplitz_figures(_report_of(rows))}
    assert measured["kernelized forward, N=512: time over the best method's"] == (1.25, False)
    assert measured["kernelized forward, N=65536: faster than torch.fft by"] == (1e6 / 65536, True)
    assert measured["kernelized forward, N=4096, effattn: memory over torch.fft's"] == (0.05, True)
    assert measured["kernelized forward, N=4096, ours fft: memory over torch.fft's"] == (0.15, False)
    assert measured["time, kernelized forward, N=16384 -> 65536: grows"] == (4.0, True)
    assert measured["kernelized forward+backward, N=512: faster than torch.fft by"] == (None, None)


def test_long_sequences_are_compared_with_the_same_function():
    """Where the specification's matrix does not fit, a transform in float64 stands for it."""
    family = families()["toeplitz"]
    case = next(c for c in family.cases if c.operator == "kernelized_rpe" and c.tokens == 512)
    inputs = family.operators[case.operator].inputs(case, torch.float32, "cpu").double()
    one = [tensor[:, :1] for tensor in inputs[:3]]
    rest = inputs.parameters["rpe_bias"][:1], inputs.parameters["projection"]
    got = toeplitz_peers.fft_reference(*one, *rest)
    torch.testing.assert_close(got, reference.kernelized_rpe_attention(*one, *rest), rtol=1e-11, atol=1e-12)


def test_a_call_that_takes_very_long_is_timed_once():
    calls = {"quick": (lambda: None, 0.0), "endless": (lambda: pytest.fail("called again"), 0.6)}
    samples = runner._interleave(calls, runner.Effort(0.1, 10, 2, longest=0.5), "cpu", lambda step: None)
    assert samples["endless"] == [0.6]
    assert len(samples["quick"]) == 10


def test_medians_and_quartiles():
    assert runner._quantile([4.0, 1.0, 3.0, 2.0, 5.0], 0.5) == 3.0
    assert runner._quantile([1.0, 2.0], 0.25) == 1.25


def test_slow_contenders_take_part_in_fewer_rounds_and_quick_ones_in_all():
    calls = {"quick": (lambda: None, 0.0), "slow": (lambda: time.sleep(0.02), 0.02)}
    samples = runner._interleave(calls, runner.Effort(0.1, 10, 2), "cpu", lambda step: None)
    assert len(samples["quick"]) == 10
    assert len(samples["slow"]) == 2
    assert min(samples["slow"]) >= 0.02 > max(samples["quick"])


def test_causal_counts_half_the_work():
    family = families()["attention"]
    causal = next(case for case in family.cases if case.operator == "causal")
    plain = dataclasses.replace(causal, operator="plain")
    n = causal.tokens
    assert flops(family, causal, FORWARD) == pytest.approx(flops(family, plain, FORWARD) * (n + 1) / (2 * n))
    assert flops(family, plain, BACKWARD) == 3.5 * flops(family, plain, FORWARD)


def test_peak_memory_sees_what_a_call_allocates_and_frees():
    if memory.peak_extra(lambda: None) is None:
        pytest.skip("no resident set to read here")
    peak = memory.peak_extra(lambda: torch.ones(16 << 20).sum())
    assert 64e6 <= peak <= 80e6


@pytest.mark.skipif(bool(photographs.missing()), reason=photographs.missing() or "-")
def test_tokens_of_photographs_are_laid_out_as_a_model_leaves_them():
    generator = torch.Generator().manual_seed(0)
    q, k, v = photographs.query_key_value(3, 2, 1 + 14 * 14, 8, (14, 14), 1, generator, torch.float32, "cpu")
    assert q.shape == (3, 2, 197, 8)
    assert q.stride() == k.stride() == v.stride() == (197 * 48, 8, 48, 1)
    assert k.data_ptr() - q.data_ptr() == 2 * 8 * 4
    # Neighbouring patches resemble each other more than far ones, which random tokens would not.
    grid = q[0, :, 1:].unflatten(1, (14, 14))
    neighbours = torch.cosine_similarity(grid[:, :, 1:], grid[:, :, :-1], dim=-1).mean()
    strangers = torch.cosine_similarity(grid[:, :, 7:], grid[:, :, :7], dim=-1).mean()
    assert neighbours > strangers + 0.1


def test_the_command_writes_json_and_a_picture(tmp_path, monkeypatch, capsys):
    family = families()["gaussian_mixture"]
    shrunk = family._replace(cases=tuple(small(case) for case in family.cases[:1]))
    monkeypatch.setattr(cli, "families", lambda: {"gaussian_mixture": shrunk})
    monkeypatch.setattr(cli.overhead, "call_overhead", lambda: {cli.asked.STOCK: 1.0})
    monkeypatch.setattr(cli.overhead, "import_time", lambda repeats: 1.0)
    monkeypatch.setattr(cli, "FULL", runner.Effort(0.05, 4, 3))
    monkeypatch.setattr(ceilings, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(ceilings, "REPEATS", 1)
    files = tmp_path / "run.json", tmp_path / "run.png"
    threads = torch.get_num_threads()
    try:
        status = cli.main(
            [
                "--dtype",
                "float32",
                "--only",
                OURS,
                "eager",
                "unmasked sdpa",
                "--json",
                str(files[0]),
                "--plot",
                str(files[1]),
            ]
        )
    finally:
        torch.set_num_threads(threads)
    assert status == 0
    written = json.loads(files[0].read_text())
    rows = written["rows"]
    assert [row["direction"] for row in rows] == ["forward", "forward+backward"]
    assert rows[0]["results"]["eager"]["ratio_to_effattn"] > 0
    for result in (result for row in rows for result in row["results"].values()):
        assert len(result["times_ms"]) == result["samples"] > 0
        assert statistics.median(result["times_ms"]) == pytest.approx(result["ms"], rel=1e-3)
    # Machines whose multiply-adds the probe knows to measure are those whose exponentials it does, but for Arm's.
    if written["ceilings"]["fp32"] and platform.machine() == "x86_64":
        assert min(written["ceilings"][name] for name in ceilings.EXPONENTIALS) > 0
    assert files[1].read_bytes()[:4] == b"\x89PNG"
    assert "gaussian_mixture, forward, fp32" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "run.png"]


@pytest.mark.parametrize("arguments", [["no such family"], ["--threads", "0"], ["--case", "no such case"]])
def test_arguments_that_fit_nothing_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "error" in capsys.readouterr().err


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_an_operator_out_of_its_budget_is_seen(factor):
    honest = accuracy.PROBLEMS[0]
    problem = honest._replace(call=lambda tensors, backend: honest.call(tensors, backend) * factor)
    (output,) = (
        e for e in accuracy.measure("reference", dtypes=[torch.float32], problems=[problem]) if e.tensor == "output"
    )
    assert output.used > 1


def test_overhead_is_measured_of_every_operator():
    from effattn import _registry

    assert set(overhead.calls()) == {overhead.STOCK, *_registry.operators()}
    for call in overhead.calls().values():
        call()


def test_overhead_table_names_every_operator():
    measured = overhead.call_overhead(rounds=1, count=1, only=(overhead.STOCK, "retention", "pack_signs"))
    found = report.Report({}, "", [], measured, None, True, None)
    lines = report.table(found).splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == sorted(
        ("retention", "pack_signs"), key=lambda name: -measured[name]
    )
