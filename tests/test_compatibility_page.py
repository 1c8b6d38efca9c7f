"""docs/compatibility.md is what packaging/matrix.json records; the cells themselves take an hour: make matrix."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def matrix():
    spec = importlib.util.spec_from_file_location("compatibility_matrix", ROOT / "packaging" / "matrix.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def records(matrix):
    return json.loads(matrix.RECORD.read_text())


def test_committed_page_is_made_of_its_record(matrix, records):
    assert matrix.render(records) == matrix.PAGE.read_text(), "stale; run: python packaging/matrix.py --render"


def test_no_cell_is_recorded_as_failed(records):
    assert [record for record in records if record["result"] == "failed"] == []


def test_a_cell_that_failed_or_is_not_there_says_why(matrix):
    asked = {"asked python": "3.12", "asked torch": "2.10.0", "build": "cpu", "commit": "0123456789abcdef"}
    asked["wheel"] = "effattn-0.1.0+cu12-py3-none-any.whl"
    page = matrix.render([{**asked, "result": "failed", "reason": "this | that\nis wrong"}])
    assert "| 2.10.0, CPU build | 3.12 | failed: this / that is wrong | - | 0.1.0+cu12 of 0123456789 |" in page
    gone = [{**asked, "asked python": python, "result": "not to be had here", "reason": "no: cause: no index"} for python in ("3.10", "3.12")]  # fmt: skip
    assert "\n- 2.10.0, CPU build, for Python 3.10, 3.12: no index\n" in matrix.render(gone)


def test_tests_that_did_not_run_are_no_pass(matrix):
    record = {"asked python": "3.12", "asked torch": "2.10.0", "build": "cuda", "result": "passed", "tests": {}}
    record |= {
        "wheel": "effattn-0.1.0-py3-none-any.whl",
        "without": list(matrix.TESTS),
        "cuda library": False,
        "cuda problem": "missing",
    }
    assert "| not run; import, `info` and `doctor` only | missing | 0.1.0 of unknown |" in matrix.render([record])
    record |= {"tests": {"passed": 3}, "without": ["test_sharding.py"]}
    assert "| 3 passed, 0 skipped, without `test_sharding.py` |" in matrix.render([record])


def test_a_command_that_fails_is_told_by_what_it_printed(matrix, tmp_path):
    with pytest.raises(matrix.Failed, match="the finding"):
        matrix.run(["sh", "-c", "echo the finding; exit 3"], tmp_path)
    assert matrix.run(["sh", "-c", "echo fine"], tmp_path) == "fine\n"


def test_a_wheel_names_its_commit(matrix, tmp_path):
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as archive:
        archive.writestr("effattn/_build.json", '{"commit": "0123"}')
    assert matrix.commit_of(tmp_path / "some.whl") == "0123"


def test_tests_of_which_none_was_chosen_fail_a_cell(matrix, monkeypatch, tmp_path):
    printed = f"PASSED tests/{matrix.TESTS[0]}[float32-24-cpu]\n1 passed, 2 skipped in 3.1s"
    monkeypatch.setattr(matrix, "run", lambda *command, **environment: printed)
    assert matrix.test(tmp_path, 1, list(matrix.TESTS[1:])) == {"passed": 1, "skipped": 2}
    with pytest.raises(matrix.Failed, match=f"of {matrix.TESTS[1]} no test was chosen"):
        matrix.test(tmp_path, 1, list(matrix.TESTS[2:]))
