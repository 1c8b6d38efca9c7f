"""One of the two processes of ``bench --compare --base``: this benchmark's harness on the library of a given tree.

    python pair_worker.py TREE        a request per line on stdin, an answer per line on stdout, both JSON

The harness is the one beside this file for both trees: cases, inputs and clock are the same, only ``effattn`` differs.
The process ends when stdin does, so also when whoever asks is gone.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

HARNESS = Path(__file__).resolve().parent
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def use(tree: Path) -> None:
    """Import ``effattn`` from ``tree`` and put this harness in the place of its ``effattn.bench``."""
    sys.path[:] = [str(tree), *(path for path in sys.path if Path(path or ".").resolve() != HARNESS)]
    effattn = importlib.import_module("effattn")
    if Path(effattn.__file__).resolve().parent.parent != tree:
        raise ImportError(f"effattn was imported from {effattn.__file__}")
    package = importlib.util.spec_from_file_location(
        "effattn.bench", HARNESS / "__init__.py", submodule_search_locations=[str(HARNESS)]
    )
    effattn.bench = sys.modules["effattn.bench"] = importlib.util.module_from_spec(package)
    package.loader.exec_module(effattn.bench)


class Worker:
    def __init__(self):
        self.call = None

    def about(self, threads: int) -> dict:
        import torch

        import effattn
        from effattn import _native

        torch.set_num_threads(threads)
        problem = _native.problem if not _native.loaded else ""
        return {"version": effattn.__version__, "problem": problem}

    def prepare(self, family: str, case: dict, dtype: str, direction: str, clock: str, output: str | None) -> dict:
        """The row's call, tried once; its result goes to ``output``."""
        import torch
        from effattn.bench import cases, runner

        self.call = None
        gc.enable()
        gc.collect()
        found = importlib.import_module(f"effattn.bench.bench_{family}").FAMILY
        case = cases.Case(**{**case, "grid": tuple(case["grid"])})
        operator = found.operators[case.operator]
        training = direction == cases.BACKWARD
        inputs = operator.inputs(case, getattr(torch, dtype), "cpu").leaves(gradients=training)
        ours = next(contender for contender in operator.contenders if contender.name == cases.OURS)
        self.call = runner.prepare(ours, case, inputs, direction)
        result = self.call()
        answer = self.sample(1, 0, clock)
        if output is not None:
            torch.save(result.detach().contiguous(), output)
            answer["inputs"] = _digest(inputs)
        gc.collect()
        gc.disable()
        return answer

    def sample(self, count: int, warm: int, clock: str) -> dict:
        now = CLOCKS[clock]
        for _ in range(warm):
            self.call()
        begin = now()
        for _ in range(count):
            self.call()
        return {"seconds": (now() - begin) / count}


def _digest(inputs) -> str:
    import torch

    seen = hashlib.sha256()
    for group in (inputs[:3], inputs.parameters.values(), inputs.fixed.values()):
        for tensor in group:
            seen.update(tensor.detach().contiguous().view(torch.uint8).numpy().data)
    return seen.hexdigest()


def main() -> None:
    # What the library prints goes to stderr: stdout is for answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    use(Path(sys.argv[1]).resolve())
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:  # noqa: BLE001 - an operator or case that this tree does not have is a row left out
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        main()
