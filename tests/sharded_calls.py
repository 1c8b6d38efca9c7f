"""Every registered operator as a call on DTensors: what may be sharded how, and what came out of it on each rank."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from conformance.cases import CASES, Case, Shape
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.experimental import implicit_replication

import effattn

SHAPE = Shape(batch=2, heads=4, grid=(2, 4), head_dim=8, prefix=1)
WITHOUT_HEADS = ("attn_mask", "sizes", "key_padding_mask")
"""Tensors of attention whose second dimension is not heads, or is one head for all."""
HEADS_OF_PARAMETERS = {"alpha": 1, "sigma": 1, "bias_table": 1}
"""Where it is not dimension 0, or where it is and the parameter has as many rows as heads."""


class Call(NamedTuple):
    """One call, in one way to shard it.

    Args:
        function: of the tensors, to a tensor or a tuple of tensors.
        tensors: its arguments by name, of the whole problem.
        shards: name -> the dimension that is sharded; the others are replicated.
        results: the dimension along which each result is sharded, None: replicated.
        free: whether there is no communication, but for sums of gradients of parameters.
        differentiable: the arguments that want a gradient; None: all that can have one.
    """

    function: Callable
    tensors: dict[str, Tensor]
    shards: dict[str, int]
    results: tuple[int | None, ...]
    free: bool = True
    differentiable: tuple[str, ...] | None = None

    def wants(self, name: str) -> bool:
        return self.tensors[name].is_floating_point() and (self.differentiable is None or name in self.differentiable)


def calls() -> dict[str, dict[str, Call]]:
    """Operator -> name of the call -> call."""
    found = {op: {} for op in CASES}
    for op, cases in CASES.items():
        for number, case in enumerate(cases):
            axes = ("batch", "heads", "nothing") if number == 0 else (("heads", "batch")[number % 2],)
            for axis in (*axes, *(("queries",) if _splits_queries(case) else ())):
                found[op][f"{case.variant or 'plain'}, {axis}"] = _attention(case, axis)
    return {**found, **_elsewhere()}


def every_operator(shape: Shape) -> dict[str, Call]:
    """A call of each; attention in ``shape``."""
    attention = {op: _attention(cases[0], "nothing", shape) for op, cases in CASES.items()}
    return {**attention, **{op: next(iter(calls.values())) for op, calls in _elsewhere().items()}}


def _splits_queries(case: Case) -> bool:
    return case.op == "size_weighted_attention" or (
        case.op == "scaled_dot_product_attention" and case.variant not in ("causal", "boolean")
    )


def _free(case: Case, axis: str) -> bool:
    if axis == "heads":
        return not (case.op == "cross_shaped_window_attention" or case.mixes_batch)
    return axis == "nothing" or not case.mixes_batch


def _attention(case: Case, axis: str, shape: Shape = SHAPE) -> Call:
    shape = shape if axis != "queries" else shape.with_(keys=7)
    if case.op == "shift_add_attention" and case.variant == "":
        shape = shape.with_(prefix=2)
    tensors = case.tensors(shape)
    shards = {}
    for name, tensor in tensors.items():
        if axis == "batch" and name not in case.parameters:
            shards[name] = 0
        elif axis == "heads" and name in case.parameters:
            dimension = HEADS_OF_PARAMETERS.get(name, 0)
            if tensor.shape[dimension] % SHAPE.heads == 0 and tensor.dim() > dimension + (name == "projection"):
                shards[name] = dimension
        elif axis == "heads" and name not in WITHOUT_HEADS and tensor.shape[1] == SHAPE.heads:
            shards[name] = 1
        elif axis == "queries" and name == "query":
            shards[name] = 2
    options = {**case.options(shape), "backend": "cpu"}
    dimension = {"batch": 0, "heads": 1, "queries": 2, "nothing": None}[axis]
    free = _free(case, axis)
    return Call(
        lambda **given: case.function(**given, **options), tensors, shards, (dimension,), free, case.differentiable
    )


def _elsewhere() -> dict[str, dict[str, Call]]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    tokens, logits = normal(2, 9, 4), normal(2, 9, 6)
    merged = {"x": tokens}
    x = normal(2, 4, 6, 40)
    rows, weight, bias = normal(2, 6, 16), normal(8, 16), normal(8)
    codes = effattn.quantize_power_of_two(weight, scale="channel")
    step = {name: normal(2, 4, 1, 8) for name in ("query", "key", "value")}
    step |= {"log_decay": effattn.retnet_log_decay(4, dtype=torch.float32), "state": normal(2, 4, 8, 8)}
    by_heads = {name: 1 for name in ("query", "key", "value", "state")} | {"log_decay": 0}
    by_example = {name: 0 for name in ("query", "key", "value", "state")}

    def plan(x):
        return effattn.bipartite_soft_matching(x, 3, backend="cpu")

    def match(x):
        found = plan(x)
        return found.source, found.members, found.offsets

    def add(bits, dense):
        return effattn.add_matmul(effattn.pack_signs(bits, backend="cpu"), dense, backend="cpu")

    def binary(left, right):
        left, right = (effattn.pack_signs(t, backend="cpu") for t in (left, right))
        return effattn.binary_matmul(left, right, 40, backend="cpu").float()

    def hamming(query, key, value):
        query, key = (effattn.pack_signs(t, backend="cpu") for t in (query, key))
        return effattn.hamming_attention(query, key, value, 40, backend="cpu")

    def shift(rows, codes, scale, bias):
        packed = effattn.PackedShiftWeight(codes, scale, 4, 16)
        return effattn.shift_linear(rows, packed, bias, backend="cpu")

    linear = {"rows": rows, "codes": codes.codes, "scale": codes.scale, "bias": bias}
    bits = {"bits": x[0], "dense": normal(4, 40, 5)}
    hammed = {"query": x, "key": x.flip(2), "value": normal(2, 4, 6, 8)}

    def every(function, tensors, dimension, *results):
        return Call(function, tensors, dict.fromkeys(tensors, dimension), results or (dimension,))

    def channels(method):
        def function(x, like):
            return getattr(plan(like), method)(x, backend="cpu")

        return function

    few = {"x": normal(2, 6, 4), "like": tokens}
    many = {"x": tokens.clone(), "like": tokens}
    return {
        "soft_merge": {
            "batch": every(lambda **t: effattn.soft_merge(**t, backend="cpu"), {"tokens": tokens, "logits": logits}, 0),
            "outputs": Call(
                lambda **t: effattn.soft_merge(**t, backend="cpu"),
                {"tokens": tokens, "logits": logits},
                {"logits": 2},
                (1,),
            ),
            "channels": Call(
                lambda **t: effattn.soft_merge(**t, backend="cpu"),
                {"tokens": tokens, "logits": logits},
                {"tokens": 2},
                (2,),
            ),
        },
        "bipartite_soft_matching": {"batch": every(match, merged, 0, 0, 0, 0)},
        "TokenMerge.merge": {
            "batch": every(channels("merge"), many, 0),
            "channels": Call(channels("merge"), many, {"x": 2}, (2,)),
        },
        "TokenMerge.merge_weighted": {
            "batch": every(channels("merge_weighted"), many, 0, 0, 0),
            "sizes and residual, batch": every(
                lambda x, residual, sizes: plan(x).merge_weighted(x, sizes, residual=residual, backend="cpu"),
                {"x": tokens, "residual": normal(2, 9, 4), "sizes": 1 + normal(2, 9).abs()},
                *(0, 0, 0),
            ),
        },
        "TokenMerge.unmerge": {
            "batch": every(channels("unmerge"), few, 0),
            "channels": Call(channels("unmerge"), few, {"x": 2}, (2,)),
        },
        "pack_signs": {
            "batch": every(lambda x: effattn.pack_signs(x, backend="cpu").view(torch.int32), {"x": x}, 0),
            "heads": every(lambda x: effattn.pack_signs(x, backend="cpu").view(torch.int32), {"x": x}, 1),
        },
        "add_matmul": {
            "batch": every(add, bits, 0),
            "rows": Call(add, bits, {"bits": 1}, (1,)),
            "columns": Call(add, bits, {"dense": 2}, (2,)),
        },
        "binary_matmul": {
            "batch": every(binary, {"left": x[0], "right": x[1]}, 0),
            "rows": Call(binary, {"left": x[0], "right": x[1]}, {"left": 1}, (1,)),
        },
        "hamming_attention": {
            "batch": every(hamming, hammed, 0),
            "heads": every(hamming, hammed, 1),
            "queries": Call(hamming, hammed, {"query": 2}, (2,)),
        },
        "shift_linear": {
            "batch": Call(shift, linear, {"rows": 0}, (0,)),
            "outputs": Call(shift, linear, {"codes": 0, "scale": 0, "bias": 0}, (2,)),
        },
        "retention_step": {
            "batch": Call(lambda **t: effattn.retention_step(**t, backend="cpu"), step, by_example, (0, 0)),
            "heads": Call(lambda **t: effattn.retention_step(**t, backend="cpu"), step, by_heads, (1, 1)),
        },
    }


def run(call: Call, place: Callable[[str, Tensor], Tensor], after_forward: Callable = lambda: None):
    """Results of the call, and gradients of a weighted sum of them, of arguments that ``place`` made."""
    leaves = {name: place(name, tensor) for name, tensor in call.tensors.items()}
    results = call.function(**leaves)
    results = results if isinstance(results, tuple) else (results,)
    after_forward()
    smooth = [r for r in results if r.requires_grad]
    if smooth:
        torch.autograd.backward(smooth, [_weights(r) for r in smooth])
    return results, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def _weights(result: Tensor) -> Tensor:
    """The same numbers on every rank, sharded as ``result`` is."""
    drawn = torch.randn(result.shape, generator=torch.Generator().manual_seed(zlib.crc32(b"weights")))
    if not isinstance(result, DTensor):
        return drawn
    whole = DTensor.from_local(drawn, result.device_mesh, [Replicate()] * result.device_mesh.ndim, run_check=False)
    return whole.redistribute(placements=result.placements)


def alone(call: Call):
    """What one process finds."""
    return run(call, lambda name, t: t.clone().requires_grad_(call.wants(name)))


def on_mesh(call: Call, mesh) -> dict:
    """What a rank finds: whole tensors, placements, and how often it communicated."""

    def placement(name: str) -> list:
        return [Shard(call.shards[name]) if name in call.shards else Replicate()]

    return _observed(call, mesh, placement)


def _observed(call: Call, mesh, placements: Callable[[str], list], *, count: bool = True) -> dict:
    def place(name: str, tensor: Tensor) -> Tensor:
        placed = distribute_tensor(tensor.clone(), mesh, placements(name), src_data_rank=None)
        return placed.requires_grad_(call.wants(name))

    communication = CommDebugMode()
    with communication if count else contextlib.nullcontext():  # torch.compile refuses to run under such a mode
        forward = []
        results, gradients = run(call, place, lambda: forward.append(communication.get_total_counts() if count else 0))
    return {
        "communications of the forward": forward[0],
        "communications": {str(op): times for op, times in communication.get_comm_counts().items() if times},
        "results": [r.full_tensor().detach() for r in results],
        "result placements": [r.placements for r in results],
        "gradients": {name: g.full_tensor() for name, g in gradients.items()},
        "gradient placements": {name: g.placements for name, g in gradients.items()},
    }


# ---- beyond one call on one mesh ----


def mixture(batch: int = 2, heads: int = 4) -> Call:
    case = CASES["gaussian_mixture_attention"][0]
    shape = SHAPE.with_(batch=batch, heads=heads)
    options = {**case.options(shape), "backend": "cpu"}
    return Call(lambda **t: case.function(**t, **options), case.tensors(shape), {}, (), True, case.differentiable)


def grouped(heads: int, key_heads: int) -> Call:
    query, key = torch.randn(2, heads, 5, 8), torch.randn(2, key_heads, 7, 8)
    return Call(
        lambda query, key: effattn.scaled_dot_product_attention(query, key, key, enable_gqa=True, backend="cpu"),
        {"query": query, "key": key},
        {"query": 1, "key": 1},
        (1,),
    )


def _by_fft() -> Call:
    case = CASES["toeplitz_linear_attention"][0]
    own = _attention(case, "heads")
    options = {**case.options(SHAPE), "backend": "cpu", "method": "fft"}
    return own._replace(function=lambda **t: case.function(**t, **options), free=False)


def more_calls() -> dict[str, Call]:
    """Calls on a mesh of one dimension whose slices are not all alike."""
    by_batch = {"query": 0, "key": 0, "value": 0}
    by_heads = {"query": 1, "key": 1, "value": 1, "alpha": 1, "sigma": 1}
    torch.manual_seed(0)
    return {
        "a batch of 3": mixture(batch=3)._replace(shards=by_batch, results=(0,)),
        "a batch of 1, one rank has nothing": mixture(batch=1)._replace(shards=by_batch, results=(0,)),
        "3 heads": mixture(heads=3)._replace(shards=by_heads, results=(1,)),
        "groups of heads": grouped(4, 2),
        "a method asked for by name": _by_fft(),
        "groups of heads that do not divide": grouped(6, 3)._replace(free=False),
    }


def on_other_meshes(world_size: int) -> dict:
    line = init_device_mesh("cpu", (world_size,))
    found = {name: on_mesh(call, line) for name, call in more_calls().items()}

    def both(name: str) -> list:
        return [Replicate(), Shard(1)] if name in ("alpha", "sigma") else [Shard(0), Shard(1)]

    plane = init_device_mesh("cpu", (world_size, 1))
    found["batch and heads"] = _observed(mixture(), plane, both)
    found["reference"] = _reference(line)
    found["compiled"] = _compiled(line)
    found["in place"] = _in_place(line)
    return found


def _reference(mesh) -> Tensor:
    """The reference mixes in tables of its own, the same on every rank: the caller says so to DTensor."""
    tensors = {
        name: distribute_tensor(t, mesh, [Shard(0) if name in ("query", "key", "value") else Replicate()])
        for name, t in mixture().tensors.items()
    }
    with implicit_replication():
        output = effattn.gaussian_mixture_attention(
            **tensors, grid=SHAPE.grid, num_prefix_tokens=SHAPE.prefix, backend="reference"
        )
    return output.full_tensor()


def _compiled(mesh) -> dict:
    call = mixture()
    compiled = torch.compile(call.function, fullgraph=True, backend="aot_eager")

    def placement(name: str) -> list:
        return [Shard(0) if name in ("query", "key", "value") else Replicate()]

    return _observed(call._replace(function=lambda **t: compiled(**t)), mesh, placement, count=False)


def _in_place(mesh) -> str:
    state = distribute_tensor(torch.zeros(2, 2, 4, 4), mesh, [Shard(0)])
    x = distribute_tensor(torch.zeros(2, 2, 1, 4), mesh, [Shard(0)])
    decay = distribute_tensor(torch.zeros(2), mesh, [Replicate()])
    try:
        effattn.retention_step(x, x, x, decay, state, inplace=True, backend="cpu")
    except NotImplementedError as error:
        return str(error)
    return "nothing was raised"
