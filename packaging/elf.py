"""What a library asks of the system and of torch, read from its dynamic symbols."""

import re
from collections import defaultdict

from elftools.elf.elffile import ELFFile

# torch's C shim, the one interface of it that keeps its ABI (torch/csrc/stable/c/shim.h, torch/csrc/inductor/aoti_torch/c/shim.h).
STABLE = re.compile(r"(aoti_)?torch_[a-z0-9_]+")


def undefined(path):
    """Undefined symbols that must be found on load, as {name: version or None}."""
    with open(path, "rb") as file:
        elf = ELFFile(file)
        needed = elf.get_section_by_name(".gnu.version_r")
        libraries = needed.iter_versions() if needed else ()
        versions = {version["vna_other"]: version.name for _, library in libraries for version in library}
        table = elf.get_section_by_name(".gnu.version")
        return {
            symbol.name: versions.get(table.get_symbol(index)["ndx"]) if table else None
            for index, symbol in enumerate(elf.get_section_by_name(".dynsym").iter_symbols())
            if symbol.name and symbol["st_shndx"] == "SHN_UNDEF" and symbol["st_info"]["bind"] != "STB_WEAK"
        }


def needed(path):
    """Names of the libraries that are loaded with it."""
    with open(path, "rb") as file:
        tags = ELFFile(file).get_section_by_name(".dynamic").iter_tags("DT_NEEDED")
        return [tag.needed for tag in tags]


def exported(path):
    """Names that other libraries could bind to."""
    with open(path, "rb") as file:
        symbols = ELFFile(file).get_section_by_name(".dynsym").iter_symbols()
        return [symbol.name for symbol in symbols if symbol.name and symbol["st_shndx"] != "SHN_UNDEF"]


def unstable(path):
    """Symbols that neither the system's libraries promise, by a version, nor torch's stable ABI."""
    return sorted(name for name, version in undefined(path).items() if not version and not STABLE.fullmatch(name))


def newest_versions(path):
    """The symbols that bind a library to the newest versions of the system's, as {"GLIBC_2.34": [names]}."""
    names = defaultdict(list)
    for name, version in undefined(path).items():
        if version:
            names[version].append(name)
    newest = {}
    for version in names:
        family, _, number = version.rpartition("_")
        order = [int(part) for part in number.split(".")]
        newest[family] = max(newest.get(family, ([], "")), (order, version))
    return {version: sorted(names[version]) for _, version in newest.values()}
