"""AOTInductor: the calls of all operators in one module, compiled to one package, so that the compiler runs once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from .checks import Module, assert_same, fresh_compiler
from .samples import SAMPLES

QUICKLY_COMPILED = {
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "aot_inductor.precompile_headers": False,
    "cpp.simdlen": 1,
    "cpp.vec_isa_ok": True,
}
"""What is compiled is the code around our kernels, which are compiled already: its speed is of no interest here."""

LOADED_ELSEWHERE = """
import sys, torch, effattn
inputs, package = torch.load(sys.argv[1]), torch._inductor.aoti_load_package(sys.argv[2])
torch.save(package(inputs), sys.argv[3])
"""


class Everything(torch.nn.Module):
    def __init__(self, ops: tuple[str, ...], backend: str):
        super().__init__()
        self.calls = torch.nn.ModuleList(Module(SAMPLES[op], backend) for op in ops)

    def forward(self, inputs: list[dict[str, Tensor]]):
        return [call(tensors) for call, tensors in zip(self.calls, inputs)]


class Package:
    """A package of the operators ``ops``, and what it gave: here, and in a process that can compile nothing."""

    def __init__(self, ops: tuple[str, ...], backend: str, folder: Path):
        self.ops = ops
        inputs = [SAMPLES[op].tensors() for op in ops]
        with fresh_compiler(), torch.no_grad():
            exported = torch.export.export(Everything(ops, backend), (inputs,))
            path = torch._inductor.aoti_compile_and_package(
                exported, package_path=str(folder / "all.pt2"), inductor_configs=QUICKLY_COMPILED
            )
            self.wanted = [SAMPLES[op](tensors, backend) for op, tensors in zip(ops, inputs)]
            self.here = torch._inductor.aoti_load_package(path)(inputs)
        given, got = folder / "inputs.pt", folder / "outputs.pt"
        torch.save(inputs, given)
        root = Path(__file__).resolve().parents[2]
        no_compiler = {**os.environ, "PATH": str(folder), "CXX": "false", "PYTHONPATH": str(root)}
        command = [sys.executable, "-c", LOADED_ELSEWHERE, str(given), path, str(got)]
        subprocess.run(command, env=no_compiler, check=True, capture_output=True, text=True, timeout=300)
        self.elsewhere = torch.load(got)

    def check(self, op: str) -> None:
        place = self.ops.index(op)
        for got in (self.here, self.elsewhere):
            assert_same(tuple(got[place]), self.wanted[place], "cpu", close=True)
