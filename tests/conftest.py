"""Environment, fixtures and profiles shared by all tests."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads of one process must not starve another's

import pytest
import torch
from hypothesis import HealthCheck, settings

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by triton when it is imported
os.environ.pop("EFFATTN_BACKEND", None)
os.environ["EFFATTN_TUNING"] = "0"  # tests run alike on a machine that was tuned

THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
torch.set_num_threads(THREADS)

_common = {
    "deadline": None,
    "database": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
settings.register_profile("default", derandomize=True, max_examples=25, **_common)
settings.register_profile("search", max_examples=1000, **_common)  # HYPOTHESIS_PROFILE=search looks for new failures
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU")
    config.addinivalue_line("markers", "slow: takes more than ten seconds")
    _load_cuda_emulator()
    if not HAS_GPU and importlib.util.find_spec("triton"):
        import quick_interpreter

        quick_interpreter.install()


def _load_cuda_emulator() -> None:
    """Without a GPU the CUDA kernels run as C++ on CPU tensors: backend "cuda" then means these."""
    from effattn import _library, _native

    if HAS_GPU or os.environ.get("EFFATTN_CUDA_EMULATOR") == "0":
        return
    import cuda_emulator

    _library.redirect("cuda", "effattn_emulator")
    _native.cuda_device = "cpu"
    try:
        cuda_emulator.load()
    except (OSError, RuntimeError) as error:
        _native.cuda_problem = f"the CUDA emulator does not load: {error}"
    else:
        _native.cuda_loaded, _native.cuda_problem = True, ""


def pytest_collection_modifyitems(items):
    if not HAS_GPU:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


def pytest_report_header():
    from effattn import _native

    interpreted = "interpreter" if os.environ.get("TRITON_INTERPRET") == "1" else "compiled"
    return (
        f"effattn: cpu kernels {'loaded' if _native.loaded else _native.problem}; triton {interpreted}; gpu {HAS_GPU}"
    )


@pytest.fixture(autouse=True)
def _same_start():
    torch.default_generator.manual_seed(0)  # torch.manual_seed takes a millisecond to ask for other devices
    if HAS_GPU:
        torch.cuda.manual_seed_all(0)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _guard_pages(request):
    """Emulated kernels run on tensors that end where no memory is mapped."""
    spec = getattr(request.node, "callspec", None)
    emulated = spec is not None and spec.params.get("backend") == "cuda" and not HAS_GPU
    if not emulated or "poisoned_empty" in request.fixturenames:  # which fills what it is given
        yield
        return
    import cuda_emulator

    with cuda_emulator.guard_pages():
        yield


def _fill_malloc_with(byte: int) -> None:
    """Make glibc fill what it hands out with ``byte`` (0: leave it as it is)."""
    if sys.platform == "linux":
        m_perturb = -6
        assert ctypes.CDLL(None).mallopt(m_perturb, byte ^ 0xFF if byte else 0) == 1


@pytest.fixture
def poisoned_empty():
    """Fresh memory is NaN from ``torch.empty`` and 3e38 inside C++, whose allocations torch does not fill."""
    _fill_malloc_with(0x7F)
    if sys.platform == "linux":
        assert (torch.empty(1000, dtype=torch.uint8) == 0x7F).float().mean() > 0.9
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    _fill_malloc_with(0)


@pytest.fixture
def fresh_log(monkeypatch, caplog):
    """What effattn logs, as if no fallback had been reported before."""
    from effattn import _registry

    monkeypatch.setattr(_registry, "_logged", set())
    caplog.set_level(logging.INFO, logger="effattn")
    return caplog
