"""Sharding rules for DTensors: which slices of an op's tensors give which slice of its results, without communication.

Every op names the axes of its tensors and those along which slices can be computed apart (``Op.axes``, ``Op.splits``).
Split along one of these over a mesh dimension,

    a tensor or result with that axis is Shard(its dimension),
    a tensor without it is Replicate: every slice reads all of it,
    a gradient without it is Partial(sum): every slice adds to it,

and any axis, or none, over each dimension of the mesh. DTensor takes the rule that moves least to get from the placements
that it is given. Imported with the first DTensor that an op meets, as torch.distributed.tensor is not cheap to import.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor._op_schema import OpSchema, OpSpec, OpStrategy, RuntimeSchemaInfo
from torch.distributed.tensor._ops.utils import generate_redistribute_costs

_registered: set[torch._ops.OpOverload] = set()
_MOVES = (torch.ops.aten.flip.default, torch.ops.aten.roll.default)


def register(op) -> None:
    """Tell DTensor the rules of ``op``, in every namespace that has it."""
    for overload in op.overloads() - _registered:
        _registered.add(overload)
        arguments = overload._schema.arguments
        tensors = sum("Tensor" in str(argument.type) for argument in arguments)
        DTensor._op_dispatcher.sharding_propagator.register_op_strategy(
            overload,
            lambda schema: _strategy(op, schema),
            # Options decide rules and shapes of results: results of the propagation are kept for each apart.
            RuntimeSchemaInfo(static_argnum=tensors, needs_pytree=False),
        )


def _register_moves() -> None:
    """Rules for flip and roll, with which ops turn their tables: DTensor of torch 2.10 and 2.11 has none."""
    propagator = DTensor._op_dispatcher.sharding_propagator
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13):
        for overload in _MOVES:
            propagator.register_op_strategy(overload, _moved, RuntimeSchemaInfo(static_argnum=1))


def _moved(schema: OpSchema) -> OpStrategy:
    """Every dimension that is moved along has to be whole; a sum over ranks may come before or after."""
    given, last = schema.args_schema[0], len(schema.op._schema.arguments) - 1
    moved = schema.args_schema[last] if len(schema.args_schema) > last else ()
    whole = {dimension % given.ndim for dimension in moved or range(given.ndim)}  # no dims: all of them
    rules = []
    for strategy in given.strategies:
        have = strategy.output_spec
        placements = tuple(Replicate() if isinstance(p, Shard) and p.dim in whole else p for p in have.placements)
        want = DTensorSpec(have.mesh, placements, have.tensor_meta)
        rules.append(OpSpec(want, (want,), [generate_redistribute_costs(given, want)]))
    return OpStrategy(rules)


def replicated(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``tensor`` on the mesh of ``like``, whole on every rank; itself where ``like`` is no DTensor."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    mesh = like.device_mesh
    return DTensor.from_local(tensor, mesh, (Replicate(),) * mesh.ndim, run_check=False)


def placement(axes: tuple, axis: str | None, is_gradient: bool = False):
    """Of a tensor or result with these axes where the op is split along ``axis``, None where it is not."""
    if axis in axes and axis is not None:
        return Shard(axes.index(axis))
    return Partial("sum") if is_gradient and axis is not None else Replicate()


def result_names(op) -> tuple[str, ...]:
    return tuple(result.name for result in op.overload("triton")._schema.returns)


def _strategy(op, schema: OpSchema) -> OpStrategy:
    arguments = schema.op._schema.arguments
    if any(argument.alias_info is not None and argument.alias_info.is_write for argument in arguments):
        raise NotImplementedError(f"{schema.op}: a DTensor cannot be written in place")
    args = [a.strategies[0].output_spec if isinstance(a, OpStrategy) else a for a in schema.args_schema]
    given = {argument.name: a for argument, a in zip(arguments, args) if isinstance(a, DTensorSpec)}
    strategies = [a for a in schema.args_schema if isinstance(a, OpStrategy)]
    mesh = next(iter(given.values())).mesh
    axes = _axes(op, given)
    results = _results(op, args, axes)
    whole = op.whole(*args).split()
    allowed = [None, *(axis for axis in op.splits if axis not in whole)]

    rules = []
    for split in itertools.product(allowed, repeat=mesh.ndim):
        if not _belong_together(axes, given, split, mesh):
            continue
        wanted = tuple(
            DTensorSpec(mesh, tuple(placement(axes[name], axis) for axis in split), spec.tensor_meta)
            for name, spec in given.items()
        )
        found = tuple(
            DTensorSpec(mesh, tuple(placement(result, axis, is_gradient) for axis in split))
            for result, is_gradient in results
        )
        costs = [generate_redistribute_costs(have, want) for have, want in zip(strategies, wanted)]
        rules.append(OpSpec(found if len(found) > 1 else found[0], wanted, costs))
    return OpStrategy(rules)


def _axes(op, given: dict[str, DTensorSpec]) -> dict[str, tuple]:
    """Axes of each argument, None in place of one that is broadcast (a table for all heads, a key head for all)."""
    lengths: dict[str, int] = {}
    for name, spec in given.items():
        for axis, length in zip(op.axes.get(name, ()), spec.shape):
            lengths[axis] = max(length, lengths.get(axis, 0))
    return {
        name: tuple(
            None if length == 1 < lengths[axis] else axis for axis, length in zip(op.axes.get(name, ()), spec.shape)
        )
        for name, spec in given.items()
    }


def _results(op, args, axes: dict[str, tuple]) -> list[tuple[tuple, bool]]:
    """Axes of each result, and whether it is a gradient to sum; what this call does not have is an empty vector."""
    fakes = op._fake(
        *(
            torch.empty(a.shape, dtype=a.tensor_meta.dtype, device="meta") if isinstance(a, DTensorSpec) else a
            for a in args
        )
    )
    found = []
    for name, fake in zip(result_names(op), (fakes,) if isinstance(fakes, torch.Tensor) else fakes):
        declared = op.axes.get(name, ())
        is_gradient = name.startswith("grad_")
        if fake.dim() < len(declared):
            found.append(((), False))
        else:
            found.append((axes.get(name.removeprefix("grad_"), declared) if is_gradient else declared, is_gradient))
    return found


def _belong_together(axes: dict[str, tuple], given: dict[str, DTensorSpec], split, mesh) -> bool:
    """Whether slices of all tensors do: where all are as long, or where all divide evenly (groups of query heads)."""
    for axis in set(split) - {None}:
        lengths = {spec.shape[axes[name].index(axis)] for name, spec in given.items() if axis in axes[name]}
        slices = math.prod(size for size, over in zip(mesh.shape, split) if over == axis)
        if not lengths or (len(lengths) > 1 and any(length % slices for length in lengths)):
            return False
    return True


_register_moves()
