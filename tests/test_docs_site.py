"""The documentation site builds without a warning, has every page and every public name, and asks no network."""

from __future__ import annotations

import fcntl
import html
import importlib.util
import operator
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import effattn

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(page.relative_to(ROOT / "docs").with_suffix(".html") for page in (ROOT / "docs").rglob("*.md"))
OUTSIDE = [Path("project", f"{name}.html") for name in ("readme", "contributing", "changelog", "results")]
FAMILIES = (
    "gaussian_mixture",
    "cross_shaped_window",
    "retention",
    "toeplitz",
    "token_merging",
    "shift_add",
    "attention",
)
TOURS = sorted((ROOT / "docs" / "tours").glob("*.md"))
SOURCE = {".py", ".h", ".cpp", ".cu", ".inc", ".sh"}


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The site's folder and what the build printed; one build, however many workers run the tests."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    site, said = shared / "site", shared / "mkdocs.txt"
    with (shared / "site.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.exists():
            ran = subprocess.run(
                [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
                cwd=ROOT,
                env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=300,
                check=False,
            )
            said.write_text(f"{ran.stdout}exit status {ran.returncode}")
    return site, said.read_text()


@pytest.fixture
def site(built):
    return built[0]


def _article(page: Path) -> str:
    text = page.read_text()
    return text[text.index("<article") : text.index("</article>")]


def _words(page: Path) -> str:
    """What a reader sees outside of code."""
    return html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"<(pre|code)\b.*?</\1>", "", _article(page), flags=re.DOTALL)))


def test_strict_build_prints_no_warning(built):
    _, said = built
    assert said.endswith("exit status 0"), said
    assert not re.findall(r"^(?:WARNING|ERROR).*", said, re.MULTILINE)
    assert not re.findall(r"^.*(?:link|anchor|nav).*$", said, re.MULTILINE)  # those that MkDocs calls information


def test_every_page_is_built_and_in_the_navigation(site):
    navigation = (site / "index.html").read_text()
    for page in (*PAGES, *OUTSIDE):
        assert (site / page).exists()
        assert page == Path("index.html") or f'href="{page}"' in navigation, f"{page} is not in the nav of mkdocs.yml"


def test_scripts_and_drafts_are_not_published(site):
    assert not [path for path in site.rglob("*.py*") if "assets" not in path.parts]


def _names():
    for module, prefix in ((effattn, ""), (effattn.nn, "nn."), (effattn.integrations, "integrations.")):
        yield from (f"{prefix}{name}" for name in module.__all__)
    yield from effattn.masks.__all__


def _shorter(name: str) -> str:
    """``patch`` for ``integrations.patch`` where both are one thing."""
    last = name.split(".")[-1]
    return last if name != last and getattr(effattn, last, None) is operator.attrgetter(name)(effattn) else name


def test_every_public_name_is_in_the_api_reference(site):
    pages = "".join(_article(page) for page in sorted((site / "api").glob("*.html")))
    entries = set(re.findall(r'id="effattn\.([\w.]+)"', pages))
    modules = {"distributed", "integrations", "nn", "reference", "visualize"}
    for name in _names():
        if name in modules:
            assert any(entry.startswith(f"{name}.") for entry in entries), name
        elif name == "__version__":
            assert "effattn.__version__" in html.unescape(pages)
        else:
            assert {name, _shorter(name)} & entries, f"no page of docs/api has ::: effattn.{name}"


def test_function_entries_show_functions_and_not_modules_of_their_name(site):
    article = _article(site / "api" / "retention.html")
    for section in ("log_decay", "Returns:", "Raises:", "Examples:"):
        assert section in article
    assert html.unescape(re.sub(r"<[^>]+>", "", article)).count("retention(\n    query") == 1


def test_formulas_are_drawn_by_the_browser_itself(site):
    article = _article(site / "api" / "gaussian_mixture.html")
    assert article.count("<math") == 2
    assert "softmax" in article[article.index("<math") : article.index("</math>")]


@pytest.mark.parametrize("page", [page for page in PAGES if page.parts[0] == "api"], ids=str)
def test_no_markup_of_docstrings_is_left(site, page):
    assert not re.findall(r":(?:func|class|meth|math):|\.\. \w+::|\\\[|\\\(|``", _words(site / page))


def test_pages_ask_no_other_server(site):
    for page in site.rglob("*.html"):
        asked = re.findall(r'<(?:script|link|img|iframe)\b[^>]*?(?:src|href)="(https?:)?//[^"]*"', page.read_text())
        assert not asked, page.name
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"@import|url\(\s*[\"']?https?:", sheet.read_text()), sheet.name


def test_links_lead_to_files_and_anchors_of_the_site(site):
    anchors = {}
    for page in site.rglob("*.html"):
        anchors[page.resolve()] = set(re.findall(r'\bid="([^"]*)"', page.read_text()))
    for page in anchors:
        if page.name == "404.html":
            continue
        for target in re.findall(r'<(?:a|img)\b[^>]*?(?:href|src)="([^"]*)"', _article(page)):
            path, _, anchor = html.unescape(target).partition("#")
            if path.startswith(("http:", "https:", "mailto:")):
                continue
            found = (page.parent / path).resolve() if path else page
            assert found.exists(), f"{page.name} links to {target}"
            if anchor and found in anchors:
                assert anchor in anchors[found], f"{page.name} links to {target}"


@pytest.mark.parametrize("family", FAMILIES)
def test_family_page_has_formula_picture_measurements_api_and_both_tables(family):
    page = (ROOT / "docs" / f"{family}.md").read_text()
    assert f"](images/{family}.png)" in page
    assert (ROOT / "docs" / "images" / f"{family}.png").exists()
    for wanted in (
        r"^#+ .*(Formula|weights are powers of two)",
        r"^#+ When it (pays|wins)",
        r"\]\(support\.md#",
        "```python",
    ):
        assert re.search(wanted, page, re.MULTILINE), wanted
    assert f"](api/{family}.md)" in page
    assert "](accuracy.md#" in page


@pytest.fixture(scope="module")
def sources():
    folders = ("csrc", "triton_kernels", "effattn", "tests", "bench")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.*") if path.suffix in SOURCE]
    names = " ".join(path.relative_to(ROOT).as_posix() for path in files)
    return "\n".join([names, *(path.read_text() for path in (*files, ROOT / "setup.py"))])


@pytest.mark.parametrize("tour", TOURS, ids=lambda tour: tour.stem)
def test_tours_name_what_is_in_the_code(tour, sources):
    text = re.sub(r"^```.*?^```", "", tour.read_text(), flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`([^`\n]+)`", text):
        for name in re.findall(r"[A-Za-z_]\w+", code):
            assert name in sources, f"{tour.name}: {code}"
        for path in re.findall(r"^(?:csrc|triton_kernels|effattn|tests|bench)/[\w./]+\.\w+$", code):
            assert (ROOT / path).exists(), f"{tour.name}: {path}"
    assert "## To change X, open Y" in text


@pytest.fixture(scope="module")
def docstrings():
    pytest.importorskip("griffe")
    spec = importlib.util.spec_from_file_location("docstrings", ROOT / "docs" / "docstrings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_docstring_markup_becomes_markdown(docstrings):
    text = "One.\n\n.. math:: a\n    = b\n\nSee :func:`effattn.f` and :func:`g`, :math:`x_1`, ``y``.\n\nExample:\n    >>> 1"
    known = {"effattn.f": "effattn.f"}
    assert docstrings.to_markdown(text, known.get) == (
        "One.\n\n\\[a = b\\]\n\n\nSee [`f`][effattn.f] and `g`, \\(x_1\\), `y`.\n\nExamples:\n    >>> 1"
    )
