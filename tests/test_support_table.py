"""docs/support.md is what the registry says today."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from effattn import _native, _registry

SCRIPT = Path(__file__).resolve().parents[1] / "docs" / "support.py"


@pytest.fixture(scope="module")
def support():
    spec = importlib.util.spec_from_file_location("support", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_committed_table_is_what_the_registry_says(support):
    assert support.main(["--check"]) == 0, "docs/support.md is stale; run: python docs/support.py"


def test_check_refuses_a_stale_table_and_writing_mends_it(support, tmp_path, monkeypatch, capsys):
    stale = tmp_path / "support.md"
    stale.write_text(support.PAGE.read_text().replace("1 to 256", "1 to 128"))
    monkeypatch.setattr(support, "PAGE", stale)
    assert support.main(["--check"]) == 1
    assert "python docs/support.py" in capsys.readouterr().err
    assert support.main([]) == 0
    assert support.main(["--check"]) == 0


def test_table_does_not_depend_on_what_this_machine_has(support, monkeypatch):
    monkeypatch.setattr(_native, "loaded", False)
    monkeypatch.setattr(_native, "problem", "gone")
    monkeypatch.setattr(_registry, "has_triton", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("EFFATTN_BACKEND", "reference")
    assert support.main(["--check"]) == 0


def test_every_operator_and_every_backend_of_it_has_a_row(support):
    page = support.page()
    for op in _registry.operators():
        section = page.split(f"\n## {op}\n")[1].split("\n## ")[0]
        for backend in _registry._table[op]:
            assert f"\n| `{backend.name}` |" in section, (op, backend.name)


def test_a_changed_predicate_changes_the_table(support, monkeypatch):
    before = support.page()
    monkeypatch.setattr(_registry, "MAX_HEAD_DIM", 128)
    assert support.page() != before
