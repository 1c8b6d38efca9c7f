"""The comparison of two versions: what is equal is called equal, 5 % is found, and files are whole or absent."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import numpy
import pytest
import torch
from effattn.bench import cli, compare, pairs, ratios, report
from effattn.bench.cases import families
from effattn.bench.runner import Effort

from effattn import _files

ROOT = Path(__file__).resolve().parents[1]
LAUNCHES, BLOCKS, ROWS = 8, 5, 10


def interleaved(random, slower: float = 0.0, launch_noise: float = 0.02, noise: float = 0.04) -> tuple[list, list]:
    """Samples of base and head as a machine gives them that others use: drift, spikes, and every launch off by some."""
    sides = [], []
    for _ in range(LAUNCHES):
        off = [launch_noise / math.sqrt(2) * random.standard_normal(), slower]
        off[1] += launch_noise / math.sqrt(2) * random.standard_normal()
        drift = numpy.cumsum(0.01 * random.standard_normal(2 * BLOCKS))
        for side in range(2):
            spikes = 0.5 * random.random(2 * BLOCKS) * (random.random(2 * BLOCKS) < 0.05)
            sides[side].append(list(numpy.exp(off[side] + drift + noise * random.standard_normal(2 * BLOCKS) + spikes)))
    return sides


def verdicts(samples: list) -> list[str]:
    names = [f"row {n}" for n in range(len(samples))]
    return [row.verdict for row in compare._verdicts(names, samples, True, [], []).rows]


def test_equal_versions_are_called_equal_in_whole_tables():
    random = numpy.random.default_rng(1)
    tables = [verdicts([interleaved(random) for _ in range(ROWS)]) for _ in range(120)]
    wrong = sum(any(verdict != compare.SAME for verdict in table) for table in tables)
    assert wrong / len(tables) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / len(tables))
    assert sum(table.count(compare.SAME) for table in tables) >= 0.99 * ROWS * len(tables)


def test_intervals_of_interleaved_rows_hold_the_truth_as_often_as_they_say():
    random = numpy.random.default_rng(2)
    found = [ratios.paired(*interleaved(random, slower=math.log(1.1))) for _ in range(400)]
    share = sum(ratio.low <= 1.1 <= ratio.high for ratio in found) / len(found)
    assert share == pytest.approx(0.95, abs=0.03)


def test_a_row_that_is_5_percent_slower_is_found_among_equal_ones():
    random = numpy.random.default_rng(3)
    quiet = {"launch_noise": 0.007, "noise": 0.02}
    tables = [
        verdicts(
            [interleaved(random, math.log(1.05), **quiet)] + [interleaved(random, **quiet) for _ in range(ROWS - 1)]
        )
        for _ in range(100)
    ]
    assert sum(table[0] == compare.SLOWER for table in tables) >= 95
    assert sum(compare.SLOWER in table[1:] or compare.FASTER in table for table in tables) <= 8


def test_a_steady_drift_cancels_within_a_block():
    times = iter(numpy.exp(0.03 * numpy.arange(4 * BLOCKS * LAUNCHES)))
    sides = [], []
    for launch in range(LAUNCHES):
        taken = [], []
        for block in range(BLOCKS):
            for side in pairs.turns(launch, block):
                taken[side].append(next(times))
        for side in range(2):
            sides[side].append(taken[side])
    assert ratios.paired(*sides).value == pytest.approx(1, abs=1e-12)


def test_what_a_launch_does_to_all_rows_widens_the_interval_of_their_mean():
    launches = numpy.exp(0.02 * numpy.random.default_rng(4).standard_normal(LAUNCHES))
    rows = [([[1.0] * 4] * LAUNCHES, [[shift] * 4 for shift in launches])] * 20
    one, all_of_them = ratios.paired(*rows[0]), ratios.paired_overall(rows)
    assert (all_of_them.low, all_of_them.high) == pytest.approx((one.low, one.high))


def test_intervals_of_separate_runs_hold_the_truth_where_nothing_drifts():
    random = numpy.random.default_rng(5)
    draws = [numpy.exp(0.05 * random.standard_normal((2, 40))) for _ in range(200)]
    found = [ratios.apart(base, 1.04 * head) for base, head in draws]
    assert sum(ratio.low <= 1.04 <= ratio.high for ratio in found) / len(found) == pytest.approx(0.95, abs=0.04)
    equal = [ratios.apart(base, head).p for base, head in draws]
    assert sum(p <= 0.05 for p in equal) / len(equal) <= 0.09


def test_holm_adjusts_for_the_number_of_rows():
    assert ratios.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert ratios.holm([0.9, 0.8]) == [1.0, 1.0]
    assert ratios.holm([]) == []


# ---- files ----


def content(factor: float = 1.0, samples: int = 20, cpu: str = "this") -> dict:
    """What a run leaves, of one row that takes about 10 ms."""
    times = [factor * (10 + 0.01 * (n % 7)) for n in range(samples)]
    row = {"operator": "plain", "case": "1x1x8x8", "dtype": "float32", "direction": "forward"}
    return {"machine": {"cpu": cpu}, "rows": [{**row, "results": {"effattn": {"times_ms": times}}}]}


def paired_content(side: str, factor: float = 1.0, identity: str = "a") -> dict:
    random = numpy.random.default_rng(0 if side == "base" else 1)
    found = content()
    launches = [[factor * (10 + 0.05 * random.standard_normal()) for _ in range(6)] for _ in range(8)]
    found["rows"][0]["results"]["effattn"] = {"launches_ms": launches, "note": ""}
    return {**found, "pairing": {"id": identity, "side": side}}


def run(folder, base, head, *more) -> int:
    names = []
    for name, found in (("base.json", base), ("head.json", head)):
        names.append(str(folder / name))
        if found is not None:
            report.write_json(found, names[-1])
    return cli.main(["--compare", *names, *more])


@pytest.mark.parametrize(
    ("factor", "more", "status", "said"),
    [
        (1.0, [], 0, "no difference"),
        (1.05, [], 1, "slower, by more than 3%"),
        (1.02, [], 0, "  slower\n"),
        (1.02, ["--threshold", "0.01"], 1, "slower, by more than 1%"),
        (0.9, [], 0, "faster"),
    ],
)
def test_the_exit_status_says_whether_a_row_is_slower_by_more_than_the_threshold(
    tmp_path, capsys, factor, more, status, said
):
    assert run(tmp_path, content(), content(factor), *more) == status
    out = capsys.readouterr().out
    assert said in out
    assert "not in the intervals" in out
    assert run(tmp_path, paired_content("base"), paired_content("head", factor), *more) == status
    out = capsys.readouterr().out
    assert said in out
    assert "Measured interleaved" in out


def test_halves_of_two_interleaved_measurements_are_two_runs(tmp_path, capsys):
    assert run(tmp_path, paired_content("base"), paired_content("head", identity="b")) == 0
    assert "not in the intervals" in capsys.readouterr().out


def test_few_samples_are_no_verdict_and_another_machine_is_said(tmp_path, capsys):
    assert run(tmp_path, content(), content(2.0, samples=4, cpu="other")) == 0
    out = capsys.readouterr().out
    assert "too few samples" in out
    assert "cpu differs: this and other" in out


@pytest.mark.parametrize(
    ("base", "head", "said"),
    [
        (content(samples=0), content(), "has no samples"),
        (content(), {"rows": [], "machine": {}}, "no row in common"),
        (content(), {"ours": 1}, "is not a result"),
        (content(), None, "No such file"),
        (paired_content("head"), paired_content("base"), "wrong order"),
    ],
)
def test_files_that_cannot_be_compared_are_refused(tmp_path, capsys, base, head, said):
    assert run(tmp_path, base, head) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--base", "."], "--base needs --compare"),
        (["--compare", "a", "b", "--base", "/"], "there is no effattn"),
        (["--compare", "a", "b", "--launches", "2"], "at least 3"),
        (["--compare", "a", "b", "--clock", "cpu", "--threads", "2"], "--threads 1"),
        (["--compare", "a", "b", "--threshold", "-1"], "not be negative"),
    ],
)
def test_options_that_make_no_comparison_are_refused(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_a_list_of_numbers_is_one_line_of_json_and_reads_back(tmp_path):
    written = {"times_ms": [1.5, -2e-5, 3], "empty": [], "text": ["[1,", "2]"], "of lists": [[1, 2], [3]]}
    report.write_json(written, str(tmp_path / "run.json"))
    text = (tmp_path / "run.json").read_text()
    assert json.loads(text) == written
    assert text.splitlines()[1] == ' "times_ms": [1.5, -2e-05, 3],'


# ---- measuring ----


def copied_tree(folder: Path, more: str) -> Path:
    """This checkout's package with ``more`` at the end of its __init__.py."""
    package = folder / "effattn"
    package.mkdir(parents=True)
    for entry in (ROOT / "effattn").iterdir():
        if entry.name not in ("__init__.py", "__pycache__", "bench"):
            (package / entry.name).symlink_to(entry.resolve())
    (package / "__init__.py").write_text((ROOT / "effattn" / "__init__.py").read_text() + more)
    return folder


def small(family: str, operator: str) -> tuple:
    found = families()[family]
    case = next(case for case in found.cases if case.operator == operator)
    return found, case.__class__(operator, 1, 2, 40, 16), torch.float32, "forward"


OTHER = """

def _other(function):
    def other(*args, **kwargs):
        return function(*args, **kwargs) + 1
    return other

scaled_dot_product_attention = _other(scaled_dot_product_attention)
del retention_step
"""


def test_two_trees_are_measured_in_turns_and_what_they_compute_is_compared(tmp_path):
    base = copied_tree(tmp_path / "base", OTHER)
    plan = [small("retention", "retention"), small("attention", "plain"), small("retention", "retention_step")]
    found = pairs.measure(plan, (base, ROOT), 1, Effort(0.2, 2, 1), launches=1)
    same, other, missing = found.pairs
    assert [len(launch) for side in same.samples for launch in side] == [4, 4]
    assert all(0 < seconds < 1 for side in same.samples for launch in side for seconds in launch)
    assert other.note.startswith("outputs differ by 1.0")
    assert missing.note.startswith("base: AttributeError")
    assert found.versions[0] == found.versions[1]
    rows = [compare._row_as_json(pair, 1) for pair in found.pairs]
    about = {"machine": {}, "rows": rows, "pairing": {"id": "a", "side": "base"}}
    comparison = compare.compare(about, {**about, "pairing": {"id": "a", "side": "head"}})
    assert [row.name for row in comparison.rows] == ["retention 1x2x40x16 float32 forward"]
    assert [text.split(":")[0] for text in comparison.broken] == ["plain 1x2x40x16 float32 forward"]
    assert "retention_step" in comparison.remarks[0]


def test_a_tree_without_its_compiled_library_is_refused(tmp_path):
    base = copied_tree(tmp_path / "base", "")
    (base / "effattn" / "_cpu.so").unlink()
    with pytest.raises(RuntimeError, match=r"_cpu\.so is missing; build it there"):
        pairs.measure([small("attention", "plain")], (base, ROOT), 1, Effort(0.1, 4, 1))


def test_an_interrupt_while_measuring_leaves_the_old_files(tmp_path, monkeypatch, capsys):
    for name in ("base.json", "head.json"):
        (tmp_path / name).write_text("old")
    monkeypatch.setattr(pairs, "measure", lambda *args, **kwargs: signal.raise_signal(signal.SIGINT))
    assert _files.exit_status(lambda: run(tmp_path, None, None, "--quick", "--base", str(ROOT))) == 130
    assert "interrupted" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"base.json": "old", "head.json": "old"}


def test_workers_end_with_whoever_asked(monkeypatch):
    processes = []

    class Remembered(pairs.Worker):
        def __init__(self, *args):
            super().__init__(*args)
            processes.append(self.process)

    monkeypatch.setattr(pairs, "Worker", Remembered)
    monkeypatch.setattr(pairs, "_launch", lambda *args: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        pairs.measure([small("attention", "plain")], (ROOT, ROOT), 1, Effort(0.1, 4, 1))
    assert len(processes) == 2
    assert all(process.returncode == -signal.SIGKILL for process in processes)
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid, 0)
