"""What importing effattn does and does not do, and what its public surface promises."""

from __future__ import annotations

import importlib
import inspect
import operator
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import effattn
from effattn import _registry

PACKAGE = Path(effattn.__file__).parent


def fresh(code: str) -> str:
    """What a new interpreter prints that imports torch first; anything on stderr fails."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "EFFATTN_BACKEND")}
    ran = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:effattn", "-c", "import sys, torch\n" + code],
        cwd=PACKAGE.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout


def test_import_prints_nothing_and_adds_only_light_modules():
    added = fresh("before = set(sys.modules); import effattn; print(*sorted(set(sys.modules) - before))").split()
    ours = [name for name in added if name.split(".")[0] == "effattn"]
    assert "effattn.ops.gaussian_mixture" in ours
    others = {name.split(".")[0] for name in added} - {"effattn"} - set(sys.stdlib_module_names)
    assert not others & {"triton", "numpy", "torchvision", "tqdm", "matplotlib", "sklearn", "pybind11"}
    assert not [name for name in added if name.startswith(("torch._dynamo", "torch._inductor", "torch.utils.flop"))]
    later = ("triton", "bench", "diagnostics", "distributed", "integrations")
    assert not [name for name in ours if any(word in name for word in later)]


def test_import_does_not_touch_cuda_or_start_a_compiler():
    code = """
def forbidden(*args, **kwargs): raise AssertionError("touched")
torch._C._cuda_getDeviceCount = torch.cuda.is_available = torch.cuda._lazy_init = forbidden
import subprocess
subprocess.Popen.__init__ = forbidden
import effattn
q = torch.randn(1, 1, 4, 8, requires_grad=True)
effattn.gaussian_mixture_attention(q, q, q, torch.ones(1, 1), torch.ones(1, 1), (2, 2)).sum().backward()
print(torch.cuda.is_initialized(), "triton" in sys.modules)
"""
    assert fresh(code) == "False False\n"


def test_a_call_on_the_cpu_does_not_import_triton():
    code = """
import effattn
q = torch.randn(1, 2, 12, 8)
for backend in ("auto", "reference"):
    effattn.gaussian_mixture_attention(q, q, q, torch.ones(1, 2), torch.ones(1, 2), (3, 4), backend=backend)
effattn.explain(effattn.scaled_dot_product_attention, q, q, q)
print("triton" in sys.modules)
"""
    assert fresh(code).endswith("False\n")


def test_importing_the_triton_package_does_not_import_triton_itself():
    assert fresh("import effattn.triton_kernels; print('triton' in sys.modules)") == "False\n"


def test_triton_kernels_install_inside_effattn():
    assert importlib.util.find_spec("effattn.triton_kernels") is not None
    assert "triton_kernels" not in {
        module.name for module in pkgutil.iter_modules([str(PACKAGE.parent / "effattn")])
    } or (importlib.import_module("effattn.triton_kernels").__name__ == "effattn.triton_kernels")


def test_version_and_typing_marker():
    assert re.fullmatch(r"\d+\.\d+\.\d+", effattn.__version__)
    assert (PACKAGE / "py.typed").exists()


def test_everything_promised_is_there():
    for module in (effattn, effattn.nn, effattn.ops, effattn.reference):
        assert module.__all__ == sorted(module.__all__)
        for name in module.__all__:
            assert getattr(module, name) is not None


PUBLIC = [
    *(getattr(effattn, name) for name in effattn.__all__ if callable(getattr(effattn, name))),
    *(getattr(effattn.nn, name) for name in effattn.nn.__all__),
]


def test_every_registered_operator_is_public():
    for op in _registry.operators():
        owner, _, method = op.rpartition(".")
        assert (owner or op) in effattn.__all__
        assert (f"token_{method}" if owner else op) in effattn.reference.__all__  # methods of TokenMerge


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda thing: thing.__name__)
def test_public_docstring_has_all_its_parts(thing):
    text = inspect.getdoc(thing)
    summary = text.splitlines()[0]
    assert summary.endswith(".")
    assert len(text.splitlines()) == 1 or not text.splitlines()[1]
    if thing is effattn.StructuredMask:
        return  # a base class, to be subclassed
    for part in ("Args:", "Raises:", "Example:"):
        assert f"\n{part}\n" in text, f"{thing.__name__} has no {part}"
    assert ">>> " in text
    signature = inspect.signature(thing)
    for name in signature.parameters:
        if name not in ("args", "kwargs"):
            assert re.search(rf"^    [^:]*\b{name}\b.*:", text, re.MULTILINE), f"{name} is not described"


@pytest.mark.parametrize("op", _registry.operators())
def test_operator_docstring_has_formula_returns_and_source(op):
    text = inspect.getdoc(operator.attrgetter(op)(effattn))
    for part in (".. math::", "\nReturns:\n", "\nSource:\n"):
        assert part in text


@pytest.mark.parametrize("op", _registry.operators())
def test_operator_takes_a_backend_by_keyword(op):
    backend = inspect.signature(operator.attrgetter(op)(effattn)).parameters["backend"]
    assert (backend.kind, backend.default) == (inspect.Parameter.KEYWORD_ONLY, "auto")


def test_rooms_of_the_house_import_what_they_may():
    """A backend never imports another or the reference; the reference knows torch alone."""
    allowed = {
        "reference": {"torch", "math", "__future__"},
        "triton_kernels": {"torch", "triton", *sys.stdlib_module_names},
    }
    for room, modules in allowed.items():
        folder = PACKAGE / room if (PACKAGE / room).exists() else PACKAGE.parent / room
        files = list(folder.glob("*.py"))
        assert files
        for file in files:
            for line in file.read_text().splitlines():
                found = re.match(r"\s*(?:from\s+([\w.]+)\s+import|import\s+([\w.]+))", line)
                name = found and (found[1] or found[2])
                if name and not name.startswith("."):
                    assert name.split(".")[0] in modules, f"{file.name}: {line.strip()}"


def test_threads_setting_is_left_alone():
    assert fresh("n = torch.get_num_threads(); import effattn; print(n == torch.get_num_threads())") == "True\n"
    assert torch.get_num_threads() >= 1
