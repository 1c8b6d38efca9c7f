"""Ctrl-C: no half-written file, no temporary file, status 130, and a process that can go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from effattn.bench import cli, report

import effattn
from effattn import _files

ROOT = str(Path(__file__).resolve().parents[1])
pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")


@pytest.fixture
def folder(tmp_path):
    """With a file of an earlier run."""
    (tmp_path / "run.json").write_text("old")
    return tmp_path


def interrupt_at_line(number: int, function) -> bool:
    """Run ``function`` with SIGINT before the ``number``-th line that _files.py executes; False if there are fewer."""
    seen = 0

    def trace(frame, event, argument):
        nonlocal seen
        if frame.f_code.co_filename != _files.__file__:
            return None
        if event in ("line", "return"):
            seen += 1
            if seen == number:
                signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        assert seen == number
        return True
    finally:
        sys.settrace(before)
    return False


def test_an_interrupt_at_any_line_of_a_write_leaves_the_old_file_or_the_new_one(folder):
    found, number = set(), 1
    while interrupt_at_line(number, lambda: report.write_json({"rows": []}, str(folder / "run.json"))):
        assert [path.name for path in folder.iterdir()] == ["run.json"], number
        text = (folder / "run.json").read_text()
        assert text == "old" or json.loads(text) == {"rows": []}
        found.add(text == "old")
        (folder / "run.json").write_text("old")
        number += 1
    assert number > 8
    assert found == {True, False}


def test_an_interrupt_in_the_middle_of_the_text_leaves_the_old_file(folder):
    def half(name):
        with open(name, "w") as file:
            file.write("half")
            file.flush()
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        _files.write_atomically(folder / "run.json", half)
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("run.json", "old")]


def test_a_write_that_fails_leaves_the_old_file(folder):
    with pytest.raises(TypeError, match="not JSON serializable"):
        report.write_json({"rows": object()}, str(folder / "run.json"))
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("run.json", "old")]


def test_a_file_is_written_with_the_rights_that_the_user_asks_for(folder):
    before = os.umask(0o027)
    try:
        report.write_json({}, str(folder / "of" / "this" / "run.json"))
    finally:
        os.umask(before)
    assert (folder / "of" / "this" / "run.json").stat().st_mode & 0o777 == 0o640


MOMENTS = {
    "the ceilings are measured": (cli.ceilings, "measure"),
    "a row is timed": (cli, "run_row"),
    "the table is made": (report, "table"),
    "the JSON is made": (report, "as_json"),
    "the JSON is renamed": (os, "replace"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupted_bench_ends_with_130_and_keeps_the_old_files(folder, monkeypatch, capsys, moment):
    ceilings = cli.ceilings.Ceilings(1, 1.0, 1.0, 1.0, 1.0, dict.fromkeys(cli.ceilings.KINDS, ""), "")
    monkeypatch.setattr(cli.ceilings, "measure", lambda threads: ceilings)
    monkeypatch.setattr(cli.ceilings, "better", lambda limits: limits)
    monkeypatch.setattr(cli.overhead, "call_overhead", dict)
    monkeypatch.setattr(cli.overhead, "import_time", lambda repeats: 1.0)
    monkeypatch.setattr(*MOMENTS[moment], lambda *args, **kwargs: signal.raise_signal(signal.SIGINT))
    arguments = ["gaussian_mixture", "--quick", "--only", "effattn", "--threads", "1"]
    arguments += ["--json", str(folder / "run.json"), "--plot", str(folder / "run.png")]
    if moment != "a row is timed":
        monkeypatch.setattr(cli, "_plan", lambda chosen, options: iter([(None, None, torch.float32, "forward")]))
        monkeypatch.setattr(cli, "_weight", lambda family, case: 1.0)
        if moment != "the ceilings are measured":
            monkeypatch.setattr(cli, "_measure", lambda plan, options: a_report(ceilings))
    assert _files.exit_status(lambda: cli.main(arguments)) == 130
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("run.json", "old")]
    assert "interrupted" in capsys.readouterr().err


def a_report(ceilings):
    return report.Report({}, ceilings, [], {}, None, True, None)


# ---- whole processes ----


def stop(arguments: list[str], after: float, folder, **environment) -> tuple[int, str]:
    """Exit status and stderr of a command that gets SIGINT ``after`` so many seconds of having imported everything."""
    code = (
        "import runpy, sys, signal, threading, os, effattn.bench.shift_add_honesty, effattn.bench.cli\n"
        f"timer = threading.Timer({after}, os.kill, (os.getpid(), signal.SIGINT)); timer.daemon = True; timer.start()\n"
        f"sys.argv = {['effattn', *arguments[1:]]!r}\n"
        f"runpy.run_module({arguments[0]!r}, run_name='__main__', alter_sys=True)\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return finished.returncode, finished.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["effattn", "bench", "gaussian_mixture", "--json", "run.json", "--plot", "run.png"],
        ["effattn", "bench", "attention", "--compare", "run.json", "new.json", "--base", ROOT],
        ["effattn.bench.shift_add_honesty", "--json", "run.json"],
        ["effattn", "tune", "--force"],
    ],
    ids=lambda arguments: " ".join(arguments[:4]),
)
def test_a_process_that_gets_ctrl_c_leaves_nothing_half_done(folder, arguments):
    status, errors = stop(arguments, 0.3, folder, EFFATTN_CACHE_DIR=str(folder / "cache"))
    assert status == 130, errors
    assert "Traceback" not in errors
    assert "interrupted" in errors
    left = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert [name for name in left if not name.endswith("lock")] == ["run.json"]
    assert (folder / "run.json").read_text() == "old"


def test_ctrl_c_in_a_long_kernel_comes_when_it_returns_and_the_next_call_is_right():
    query = torch.randn(1, 4, 2048, 64)
    small = query[:, :, :64]
    wanted = effattn.scaled_dot_product_attention(small, small, small, backend="cpu")

    def long() -> None:
        started = time.monotonic()
        while time.monotonic() < started + 30:
            effattn.scaled_dot_product_attention(query, query, query, backend="cpu")

    before = signal.signal(signal.SIGALRM, lambda *args: signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, 0.02)
    try:
        with pytest.raises(KeyboardInterrupt):
            long()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert torch.equal(effattn.scaled_dot_product_attention(small, small, small, backend="cpu"), wanted)
