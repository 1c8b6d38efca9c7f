"""Docstrings of the package for the site: roles and ``.. math::`` blocks become Markdown (an extension of griffe)."""

from __future__ import annotations

import re
import textwrap

import griffe

NAMESPACES = ("effattn", "effattn.nn", "effattn.masks", "effattn.integrations", "effattn.integrations.timm")
SECTIONS = ("Args", "Returns", "Raises", "Source", "Shape", "Example", "Yields", "Note")
_ROLE = re.compile(r":(?:func|class|meth|mod|attr):`~?([^`]+)`")
_INLINE_FORMULA = re.compile(r":math:`([^`]+)`")
_LITERAL = re.compile(r"``([^`]+)``")
_FORMULA = re.compile(r"^( *)\.\. math::([^\n]*)\n((?:\1 +[^\n]*\n|\n(?=\1 +\S))*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites every docstring before the sections of it are parsed."""

    def __init__(self) -> None:
        super().__init__()
        self._public: dict[str, str] = {}

    def on_package(self, *, pkg: griffe.Module, **_) -> None:
        """Once all is loaded: only then is it known which names are public."""
        if pkg.name != "effattn":
            return
        _complete(pkg)
        for namespace in NAMESPACES:
            module = pkg if namespace == "effattn" else pkg[namespace.removeprefix("effattn.")]
            for name in module.exports or _functions(module):
                self._public.setdefault(str(name), f"{namespace}.{name}")
        self._rewrite(pkg, set())

    def _rewrite(self, thing, seen: set[str]) -> None:
        if thing.is_alias or thing.path in seen:
            return
        seen.add(thing.path)
        if thing.docstring is not None:
            thing.docstring.value = to_markdown(thing.docstring.value, lambda name: self._resolve(thing, name))
        for member in list(thing.members.values()):
            self._rewrite(member, seen)

    def _resolve(self, thing, name: str) -> str | None:
        """The public path of what a role names: fully, or as it is called in the class or module around it."""
        name = name.removesuffix("()")
        around = thing if thing.is_class else thing.parent
        if around is not None and around.is_class and around.name in self._public and _documented(around, name):
            return f"{self._public[around.name]}.{name}"
        first, *rest = name.removeprefix("effattn.").removeprefix("nn.").split(".")
        return ".".join((self._public[first], *rest)) if first in self._public else None


def _complete(pkg) -> None:
    """``effattn.retention`` is the function; griffe would follow the name to the module that is called the same."""
    for name in map(str, pkg.exports):
        module = pkg["ops"].members.get(name)
        if module is not None and module.is_module and name in module.members:
            pkg.set_member(name, griffe.Alias(name, f"{module.path}.{name}", parent=pkg))
        elif name not in pkg.members and name in pkg["integrations"].members:  # by effattn.__getattr__, when asked for
            pkg.set_member(name, griffe.Alias(name, f"effattn.integrations.{name}", parent=pkg))


def _documented(owner, name: str) -> bool:
    return name in owner.members and owner.members[name].docstring is not None


def _functions(module) -> list[str]:
    return [n for n, m in module.members.items() if not n.startswith("_") and not m.is_alias and not m.is_attribute]


def to_markdown(text: str, resolve) -> str:
    """``text`` with its roles, literals and formulas as Markdown."""

    def formula(match: re.Match) -> str:
        indent, first, rest = match.groups()
        latex = " ".join((first + " " + textwrap.dedent(rest)).split())
        return f"{indent}\\[{latex}\\]\n\n"

    def role(match: re.Match) -> str:
        path = resolve(match[1])
        return f"`{match[1]}`" if path is None else f"[`{match[1].removeprefix('effattn.')}`][{path}]"

    text = _FORMULA.sub(formula, text + "\n")
    text = _INLINE_FORMULA.sub(r"\\(\1\\)", text)
    text = _ROLE.sub(role, text)
    text = _LITERAL.sub(r"`\1`", text)
    return _sections(text).rstrip("\n")


def _sections(text: str) -> str:
    """Names that griffe knows: "Examples", and a bar between two exceptions of one entry."""
    lines, section = [], ""
    for line in text.split("\n"):
        head = line.strip().removesuffix(":")
        if head in SECTIONS and line.strip().endswith(":"):
            section = head
            line = line.replace("Example:", "Examples:")
        elif section == "Raises":
            line = re.sub(r"^( +)(\w+(?:, \w+)+):", lambda m: f"{m[1]}{m[2].replace(', ', ' | ')}:", line)
        lines.append(line)
    return "\n".join(lines)
