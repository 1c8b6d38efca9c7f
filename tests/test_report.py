"""The report: what --sweep measures, and that docs/benchmarks.md says what was measured, the losses too."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from effattn.bench import ceilings, cli, machines, memory, page_models, page_tables, pages, pictures, recorded, sweep
from effattn.bench.cases import BACKWARD, FORWARD, OURS, UNMASKED, families

SWEEPS = [pytest.param(family, one, id=one.title) for family in families().values() for one in family.sweeps]
ABOUT = {
    **{"cpu": "AMD EPYC (family 25 model 17)", "cores": 2, "threads": 2, "gpu": None, "torch": "2.13.0+cpu"},
    **{"commit": "abc", "date": "2026-01-02T03:04:05+00:00"},
}


def result(ms, spread=0.0, error=1e-7, samples=9, note=""):
    quartiles = (ms - spread / 2, ms + spread / 2)
    return {"ms": ms, "quartiles": quartiles, "samples": samples, "memory": None, "error": error, "note": note}


def row(tokens, results, direction="forward", family="attention", operator="plain"):
    shape = (1, 8, tokens, 64)
    return {
        **{"family": family, "operator": operator, "case": "x".join(map(str, shape)), "shape": shape},
        **{"dtype": "float32", "direction": direction, "floor_ms": 0.5, "results": results},
    }


def record(folder, rows, name="run", machine="some-cpu-2-cores", **about):
    limits = ceilings.none(2, "")._replace(copy=30e9, fp32=230e9)._asdict()
    content = {"machine": {**ABOUT, **about}, "complete": True, "cores_used_by_others": 0.25}
    content |= {"ceilings": limits, "rows": rows}
    path = folder / machine / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


# ---- what is measured ----


def test_every_family_has_a_sweep():
    assert all(family.sweeps for family in families().values())


@pytest.mark.parametrize(("family", "one"), SWEEPS)
def test_a_sweep_can_be_drawn(family, one):
    tokens = [case.tokens for case in one.cases]
    assert len(tokens) >= pictures.FEWEST
    assert tokens == sorted(set(tokens))
    assert one.compiled
    assert {*one.trained, *one.compiled} <= set(tokens)
    assert len(one.trained) in (0, *range(pictures.FEWEST, len(tokens) + 1))
    assert not (one.trained and one.cases[0].forward_only)
    fixed = {dataclasses.replace(c, operator="", tokens=0, output_tokens=0, grid=(), label="") for c in one.cases}
    assert len(fixed) == 1, "something else grows too"
    for case in one.cases:
        names = {contender.name for contender in family.operators[case.operator].contenders}
        assert {OURS, one.eager, *one.rivals} <= names - set(one.without)
        assert len(names - set(one.without) - {OURS, UNMASKED}) >= 2
        assert case.grid == () or case.grid[0] * case.grid[1] == case.tokens


def test_rows_come_shortest_first_and_each_direction_has_its_own_pace():
    family = families()["retention"]
    found = list(sweep.rows(family))
    assert len(found) == sum(len(one.cases) + len(one.trained) for one in family.sweeps)
    assert len({id(pace) for *_, pace in found}) == 2 * len(family.sweeps)


def test_who_would_take_too_long_is_left_out_with_the_reason():
    one = families()["attention"].sweeps[0]
    contenders = {c.name: c for c in families()["attention"].operators["plain"].contenders}
    pace, case = sweep.Pace(), one.cases[-1]
    assert pace.left_out(one, case, contenders["eager"]) == ""
    for tokens, ms in ((1024, 100.0), (2048, 400.0)):
        timed = SimpleNamespace(ms=ms)
        shorter = dataclasses.replace(case, tokens=tokens)
        pace.learn(SimpleNamespace(case=shorter, results={"eager": timed, OURS: timed}))
    assert pace.left_out(one, case, contenders["eager"]) == ""  # 0.4 s at 2048 becomes 6.4 s at 8192
    longer = dataclasses.replace(case, tokens=16384)
    reason = pace.left_out(one, longer, contenders["eager"])
    assert reason == "would take about 26 s a call: 0.4 s at 2048, growing with power 2.0"
    assert pace.left_out(one, longer, contenders[OURS]) == ""
    assert pace.left_out(one, longer, contenders["flex"]) == "compiled at 1024 and 4096 tokens only"


@pytest.fixture
def tiny(monkeypatch):
    """A family of one sweep over two tiny lengths; without the seconds that ceilings and peaks of memory take."""
    monkeypatch.setattr(ceilings, "measure", lambda threads: ceilings.none(threads, "not now"))
    monkeypatch.setattr(memory, "peak_extra", lambda call, device: call())
    family = families()["attention"]
    one = family.sweeps[0]
    short = dataclasses.replace(one.cases[0], heads=2, head_dim=16)
    cases = tuple(dataclasses.replace(short, tokens=tokens) for tokens in (8, 32))
    shrunk = family._replace(sweeps=(one._replace(cases=cases, trained=(8,), compiled=()),))
    monkeypatch.setattr(cli, "families", lambda: {"attention": shrunk})
    threads = torch.get_num_threads()
    yield shrunk
    torch.set_num_threads(threads)


def test_a_sweep_writes_a_run_that_is_read_back_and_resumes(tiny, tmp_path, monkeypatch, capsys):
    machine, commit = sweep.report.machine, ["abc"]
    monkeypatch.setattr(sweep.report, "machine", lambda *of: {**machine(*of), "commit": commit[0]})
    command = ["attention", "--sweep", "--quick", "--into", str(tmp_path / "here")]
    assert cli.main(command) == 0
    (run,) = recorded.runs(tmp_path)
    assert run.path.name == "sweep_attention.json"
    assert run.foreign_load is not None
    measured = [(r["shape"][2], r["direction"]) for r in run.rows]
    assert measured == [(8, "forward"), (32, "forward"), (8, "forward+backward")]
    assert run.rows[0]["results"]["eager"]["ratio_to_effattn"] > 0
    assert "only" in run.rows[0]["results"]["flex"]["note"]
    written = run.path.stat().st_mtime_ns
    assert cli.main([*command, "--resume"]) == 0
    assert run.path.stat().st_mtime_ns == written
    commit[0] = "def"
    assert cli.main([*command, "--resume"]) == 0
    assert run.path.stat().st_mtime_ns > written
    capsys.readouterr()


def test_an_interrupted_sweep_keeps_the_families_that_are_done(tiny, tmp_path, monkeypatch, capsys):
    measure, calls = sweep._measure, []

    def second_is_interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(sweep, "_measure", second_is_interrupted)
    where = {"device": "cpu", "threads": 1, "folder": str(tmp_path)}
    assert sweep.run([tiny, tiny._replace(name="second")], sweep.QUICK, **where) == sweep.INTERRUPTED
    assert [path.name for path in tmp_path.iterdir()] == ["sweep_attention.json"]
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--sweep", "--asked"], ["--sweep", "--dtype", "bfloat16"], ["--sweep", "--quick"], ["--resume"]]
)
def test_options_that_a_sweep_does_not_take_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "--sweep" in capsys.readouterr().err


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_beyond_what_fits_mixtures_are_held_to_their_mask_by_distance(direction, monkeypatch):
    from effattn.bench import bench_gaussian_mixture as mixture

    case = dataclasses.replace(families()["gaussian_mixture"].sweeps[0].cases[0], heads=2, tokens=35, grid=(5, 7))
    operator = families()["gaussian_mixture"].operators[case.operator]
    inputs = operator.inputs(case, torch.float32, "cpu").leaves(gradients=direction == BACKWARD)
    _, formula = operator.expected(case, inputs)
    monkeypatch.setattr(mixture, "LONGEST_FORMULA", 34)
    _, by_distance = operator.expected(case, inputs)
    torch.testing.assert_close(by_distance, formula, rtol=1e-12, atol=1e-12)
    assert not torch.equal(by_distance, formula), "the other way was not taken"


# ---- machines ----


@pytest.mark.parametrize(
    ("cpu", "gpu", "name"),
    [
        ("AMD EPYC (family 25 model 17)", None, "amd-epyc-zen4-2-cores"),
        ("AMD EPYC (family 26 model 2)", None, "amd-epyc-zen5-2-cores"),
        ("AMD EPYC (family 99 model 1)", None, "amd-epyc-family-99-model-1-2-cores"),
        ("AMD EPYC 9654 96-Core Processor (family 25 model 17)", None, "amd-epyc-9654-2-cores"),
        ("Intel(R) Xeon(R) Platinum 8480+ (family 6 model 143)", None, "intel-xeon-platinum-8480-2-cores"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz (family 6 model 79)", None, "intel-xeon-family-6-model-79-2-cores"),
        ("aarch64", None, "aarch64-2-cores"),
        ("AMD EPYC (family 25 model 17)", "NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
    ],
)
def test_a_machine_names_its_folder(cpu, gpu, name):
    assert machines.folder({"cpu": cpu, "gpu": gpu, "cores": 2}) == name


def test_recorded_runs_lie_in_their_machines_folder():
    assert {run.machine for run in recorded.runs()} == {machines.folder(run.about) for run in recorded.runs()}


# ---- the page ----


def test_committed_page_is_what_the_json_says(capsys):
    assert pages.main(["--check"]) == 0, "docs/benchmarks.md is stale; run: python -m effattn.bench.pages"
    drawn = {f"images/benchmarks/{path.name}" for path in pages.IMAGES.glob("*.png")}
    text = pages.PAGE.read_text()
    assert drawn == {link.split(")")[0] for link in text.split("](")[1:] if link.startswith("images/")}


def test_check_refuses_a_stale_page(tmp_path, monkeypatch, capsys):
    stale = tmp_path / "benchmarks.md"
    stale.write_text(pages.PAGE.read_text().replace("x |", "y |", 1))
    monkeypatch.setattr(pages, "PAGE", stale)
    assert pages.main(["--check"]) == 1
    assert "python -m effattn.bench.pages" in capsys.readouterr().err


LOST = """\
Of 3 times of peers, 2 are shorter than ours in the same row. 1 of these are of peers whose results are held to the same reference as ours, \
1 of others: dense layers, lower precision, copies, attention without structure.

| operator | B x H x N x D | dtype | pass | effattn, ms | faster | its ms | its time over ours | same reference | quartiles overlap | run |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| plain | 1x8x128x64 | fp32 | forward | 2.00 | copy | 0.500‡ | 0.250x | no | no | run |
| plain | 1x8x128x64 | fp32 | forward | 2.00 | eager formula | 1.80† | 0.900x | yes | yes | run |

Another way of ours to compute the same, which the caller has to choose, was faster than the call as it stands:

| operator | B x H x N x D | dtype | pass | effattn, ms | faster | its ms | its time over ours | quartiles overlap | run |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| plain | 1x8x128x64 | fp32 | forward | 2.00 | ours fft | 1.00 | 0.500x | no | run |"""


@pytest.fixture
def lost(tmp_path):
    results = {
        **{OURS: result(2.0), "eager": result(1.8, 0.6), "copy": result(0.5, error=None, samples=1)},
        **{"ours fft": result(1.0), "torch.compile": result(0.0, note="RuntimeError: no"), "flex": result(4.0)},
    }
    record(tmp_path, [row(128, results)])
    return tmp_path


def test_losses_are_told_largest_first(lost):
    (machine,) = pages.by_machine(lost)
    assert page_tables.losses(machine.shown) == LOST


def test_a_page_has_the_losses_the_reasons_and_where_each_number_is_from(lost):
    page = pages.page(lost)
    assert LOST in page
    assert "**No GPU has run this**" in page
    assert "| 1x8x128x64 | fp32 | forward | 2.00 | **1.80† (0.90x)** |" in page
    assert "Not timed: torch.compile (1x8x128x64): RuntimeError: no." in page
    assert "Not drawn, for fewer than 3 of its lengths" in page
    assert "| AMD EPYC (family 25 model 17) | 2 | 2026-01-02 | abc | 2.13.0+cpu | 0.25 | 30.0 | 230.0 |" in page


def test_a_gpu_stands_beside_the_cpu(lost):
    record(lost, [row(128, {OURS: result(0.1), "eager": result(0.3)})], machine="some-gpu", gpu="Some GPU")
    page = pages.page(lost)
    assert "No GPU" not in page
    assert "GPUs that have run this: some-gpu." in page
    assert page.index("### Plain attention, some-cpu-2-cores") < page.index("### Plain attention, some-gpu")


def test_the_newest_row_counts_and_an_older_one_that_tells_more_is_shown(tmp_path):
    record(tmp_path, [row(128, {OURS: result(9.0), "flex": result(9.0)})], "older")
    record(tmp_path, [row(128, {OURS: result(1.0), "eager": result(1.5)})], "newer", date="2026-01-03T00:00:00+00:00")
    record(tmp_path, [row(128, {OURS: result(8.0), "eager": result(8.0)})], "oldest", date="2026-01-01T00:00:00+00:00")
    (machine,) = pages.by_machine(tmp_path)
    assert [run.path.stem for _, run in machine.newest] == ["newer"]
    assert [run.path.stem for _, run in machine.shown] == ["newer", "older"]
    (standing,) = pages.standings(families()["attention"], machine.newest)
    assert standing.fastest == standing.eager == [1.5]


def test_models_below_their_eager_form_are_told():
    forms = {"effattn": result(2.0), "eager": result(1.0)}
    comparison = {
        **{"model": "M", "pixels": 224, "direction": "training", "batch": 8, "results": forms},
        **{"images_per_second": {"effattn": 4000.0, "eager": 8000.0}, "ratio": {"effattn": 1.0, "eager": 0.5}},
        "ratio_if_our_operators_took_no_time": 1.5,
    }
    path = recorded.RESULTS / "some-cpu" / "models.json"
    text = page_models.section([page_models.Other(path, {"comparisons": [comparison]})])
    assert "Ours has fewer in 1 comparisons." in text
    assert "| M, 224 pixels | training | 8 | 4e+03 | 8e+03 | **0.50x** | 1.50x | - |" in text


def test_pictures_are_drawn_and_the_same_bytes_each_time(tmp_path):
    lengths = (256, 1024, 2048)
    rows = [
        row(n, {OURS: result(n / 9), "eager": result(n / 4), UNMASKED: result(n / 10, error=None)}) for n in lengths
    ]
    del rows[-1]["results"]["eager"]
    record(tmp_path, rows)
    first, second = (pages.write_pictures(tmp_path, tmp_path / name) for name in ("first", "second"))
    assert [path.name for path in first] == ["some-cpu-2-cores-attention.png", "some-cpu-2-cores-summary.png"]
    assert all(a.read_bytes() == b.read_bytes() and a.read_bytes()[:4] == b"\x89PNG" for a, b in zip(first, second))
    assert b"matplotlib" not in first[0].read_bytes()
