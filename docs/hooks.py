"""What MkDocs does not do by itself: pages from outside docs/, links that leave it, formulas without a network."""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {  # file of the repository: page of the site
    "README.md": "project/readme.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "bench/results/README.md": "project/results.md",
}
_SOURCES = {page: source for source, page in PAGES.items()}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]*)(#[^)\s]*)?\)")
_FENCE = re.compile(r"(^```.*?^```$|`[^`\n]+`\()", re.MULTILINE | re.DOTALL)
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files, config):
    """Publish the pages that lie outside docs/, and the measurements that pages link to."""
    measured = {p.relative_to(ROOT).as_posix() for p in (ROOT / "bench" / "results").rglob("*.json")}
    for source, page in (*PAGES.items(), *((path, path.removeprefix("bench/")) for path in measured)):
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links as they are right in the repository become links as they are right in the site.

    A file that the site does not have (a source, the licence) stays as the text of its link.
    """
    source = _SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    here = posixpath.dirname(page.file.src_uri) or "."

    def link(match: re.Match) -> str:
        picture, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        published = PAGES.get(path) or path.removeprefix("docs/" if path.startswith("docs/") else "bench/")
        found = files.get_file_from_path(published)
        if found is None or found.inclusion.is_excluded():
            if not (ROOT / path).exists():
                return match[0]  # MkDocs says so
            return text
        return f"{picture}[{text}]({posixpath.relpath(published, here)}{anchor})"

    parts = _FENCE.split(markdown)
    return "".join(part if index % 2 else _LINK.sub(link, part) for index, part in enumerate(parts))


def on_page_content(content, page, config, files):
    """Formulas as MathML, which browsers draw themselves."""

    def formula(match: re.Match) -> str:
        latex = re.sub(r"\\mathrm\{(\w\w+)\}", r"\\operatorname{\1}", html.unescape(match[3]))  # one word, not letters
        return convert(latex, display="block" if match[2] == "[" else "inline")

    return _FORMULA.sub(formula, content)
