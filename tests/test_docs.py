"""What the documentation shows runs: docstring examples and every Python snippet of every page."""

from __future__ import annotations

import doctest
import importlib
import logging
import pkgutil
import re
import sys
import types
from pathlib import Path

import pytest
import torch

import effattn

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _modules():
    yield effattn
    for info in pkgutil.walk_packages(effattn.__path__, "effattn."):
        if not info.name.startswith(
            ("effattn.triton_kernels", "effattn.bench", "effattn._cpu", "effattn._cuda", "effattn.__main__")
        ):
            yield importlib.import_module(info.name)


def _examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = {}
    for module in _modules():
        for test in finder.find(module, module.__name__):
            if test.examples:
                found[test.name] = test
    return found


EXAMPLES = _examples()


@pytest.mark.parametrize("name", EXAMPLES)
def test_docstring_example(name):
    output: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(EXAMPLES[name], out=output.append)
    assert result.attempted
    assert not result.failed, "".join(output)


def test_every_public_operator_has_an_example():
    for name in effattn.__all__:
        thing = getattr(effattn, name)
        if callable(thing) and thing is not effattn.StructuredMask:
            assert f"{thing.__module__}.{name}" in EXAMPLES


def _snippets():
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            line = text[: match.start()].count("\n") + 1
            yield pytest.param(match[1], id=f"{page.relative_to(ROOT)}:{line}")


@pytest.fixture
def untouched_logging():
    root, ours = logging.getLogger(), logging.getLogger("effattn")
    before = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])


@pytest.mark.parametrize("code", _snippets())
def test_page_snippet(code, tmp_path, monkeypatch, untouched_logging):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    module = types.ModuleType("snippet")
    monkeypatch.setitem(sys.modules, "snippet", module)  # torch's compiler imports the module of what it traces
    exec(compile(code, "snippet", "exec"), module.__dict__)


def test_readme_shows_python_and_every_public_operator():
    readme = (ROOT / "README.md").read_text()
    assert readme.count("```python") >= 3
    for name in ("gaussian_mixture_attention", "scaled_dot_product_attention", "GaussianMixtureMask", "explain"):
        assert name in readme


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_inside_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http:", "https:", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
