"""Declares fused operators to torch: schema, shape rule, autograd, vmap and FLOP count, once per operator.

Every torch op is declared with one schema in every namespace:

    effattn::X         compiled kernels, found by dispatch key (CPU from _cpu.so, CUDA from _cuda.so)
    effattn_triton::X  Triton launchers of the same name in effattn.triton_kernels.<family>

so a backend is a namespace, and whatever sees torch ops (compile, export, FakeTensor, profiler, FLOP counter) sees all.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable

import torch
from torch.autograd import forward_ad

from . import _flops

NAMESPACES = {"cpu": "effattn", "cuda": "effattn", "triton": "effattn_triton"}

NO_SECOND_DERIVATIVE = "effattn's kernels have no second derivative; backend='reference' has"

_libraries: dict[str, torch.library.Library] = {}
_ops: dict[str, Op] = {}
_operators: dict[str, Operator] = {}


class Op:
    """One torch op, declared in every namespace; calling it runs a backend's kernel, below autograd.

    Args:
        schema: ``name(arguments) -> results``.
        fake: the shape rule, called with the op's arguments.
        family: module of ``effattn.triton_kernels`` that launches it.
        vmap: called with the overload, gives its vmap rule; default: a loop over the mapped examples.
        flops: ``(*argument_shapes, out_shape=...)`` -> FLOPs.
        axes: names of the dimensions of its tensors and results, as in "batch heads queries"; trailing ones and those of
            tensors without any to split may be left out. Sharding rules follow from it (_sharding.py).
        splits: names of the axes along which slices can be computed apart.
        whole: (tensors and options) -> those of them along which this call cannot.
    """

    def __init__(
        self,
        schema: str,
        fake: Callable,
        *,
        family: str,
        vmap: Callable | None = None,
        flops=None,
        axes: dict[str, str] | None = None,
        splits: str = "",
        whole: Callable[..., str] = lambda *args: "",
    ):
        self.schema, self.name = schema, schema[: schema.index("(")]
        self._fake, self._family, self._vmap, self._flops = fake, family, vmap or _loop, flops
        self.axes = {name: tuple(names.split()) for name, names in (axes or {}).items()}
        self.splits, self.whole = tuple(splits.split()), whole
        self._overloads: dict[str, torch._ops.OpOverload] = {}
        for namespace in dict.fromkeys(NAMESPACES.values()):
            self.declare(namespace)
        _ops[self.name] = self

    def declare(self, namespace: str) -> None:
        if namespace not in _libraries:
            _libraries[namespace] = torch.library.Library(namespace, "FRAGMENT")
        library, qualified = _libraries[namespace], f"{namespace}::{self.name}"
        library.define(self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(qualified, self.fake, lib=library)
        packet = getattr(getattr(torch.ops, namespace), self.name)
        torch.library.register_vmap(qualified, self._vmap(packet.default), lib=library)
        if self._flops is not None:
            _flops.register(packet, self._flops)
        if namespace == NAMESPACES["triton"]:
            for key in ("CPU", "CUDA"):
                library.impl(self.name, _triton_launcher(self._family, self.name), key)
        for backend, place in NAMESPACES.items():
            if place == namespace:
                self._overloads[backend] = packet.default

    def fake(self, *args):
        if "torch.distributed.tensor" in sys.modules:  # a DTensor asks here first, and then for the sharding rule
            from . import _sharding

            _sharding.register(self)
        return self._fake(*args)

    def overload(self, backend: str) -> torch._ops.OpOverload:
        return self._overloads[backend]

    def overloads(self) -> set[torch._ops.OpOverload]:
        return set(self._overloads.values())

    def __call__(self, backend: str, *args):
        return self._overloads[backend](*args)


def redirect(backend: str, namespace: str) -> None:
    """Let ``backend`` mean the ops of ``namespace``: how tests run the CUDA kernels where there is no GPU."""
    NAMESPACES[backend] = namespace
    for op in _ops.values():
        op.declare(namespace)


def _triton_launcher(family: str, name: str) -> Callable:
    def launch(*args):
        return getattr(importlib.import_module(f"effattn.triton_kernels.{family}"), name)(*args)

    return launch


class Operator:
    """A differentiable attention operator: ``X_fwd`` returns the output and what ``X_bwd`` needs of the forward.

    Args:
        name: ``X`` above.
        family: module of ``effattn.triton_kernels`` that launches it.
        tensors: its tensor arguments, query, key and value first; a leading ``?`` marks an optional one.
        differentiable: those of them that receive a gradient, in the order in which ``X_bwd`` returns it (an empty
            tensor for an optional one that is absent).
        parameters: those of them that have no batch dimension.
        options: schema of the remaining arguments.
        results: the differentiable results of the forward, the output first; ``X_bwd`` takes a gradient of each, None
            for a further one that the caller does not use.
        passes: a tensor argument that is added to the output as it is: its gradient is the output's.
        saved: what the forward returns beside them, name -> (shape from query's shape); float32, batch first.
        saves_output: whether ``X_bwd`` takes the output too.
        shares: a tensor argument -> the differentiable one whose gradient is its gradient as well.
        linear: those in which the results are jointly linear (no constant beside them), or a function of tensors and
            options that gives their names: their forward-mode derivative is the operator itself.
        linear_results: how many of the results, from the first, that holds for; the rest do not depend on them.
        mixes_batch: (tensors and options) -> whether an example's result depends on the rest of its batch.
        fake: (*tensors, *options) -> the results and what is saved; default: one result like query.
        flops: (query_shape, key_shape, value_shape, *options) -> FLOPs of the forward.
        backward_flops: FLOPs of the backward over those of the forward; attention recomputes the scores.
        axes: as :class:`Op`, where not "batch heads", of parameters "heads".
        splits, whole: as :class:`Op`; a call that mixes its batch is whole along it.
    """

    def __init__(
        self,
        name: str,
        *,
        family: str,
        tensors: tuple[str, ...],
        differentiable: tuple[str, ...],
        parameters: tuple[str, ...] = (),
        options: str,
        results: tuple[str, ...] = ("output",),
        passes: str | None = None,
        saved: dict[str, Callable] | None = None,
        saves_output: bool = True,
        shares: dict[str, str] | None = None,
        linear: tuple[str, ...] | Callable[..., tuple[str, ...]] = (),
        linear_results: int | None = None,
        mixes_batch: Callable[..., bool] = lambda *args: False,
        fake: Callable | None = None,
        flops: Callable[..., int] | None = None,
        backward_flops: float = 2.5,
        axes: dict[str, str] | None = None,
        splits: str = "batch heads",
        whole: Callable[..., str] = lambda *args: "",
    ):
        names = [tensor.removeprefix("?") for tensor in tensors]
        inputs = ", ".join(f"Tensor{'?' if t[0] == '?' else ''} {n}" for t, n in zip(tensors, names))
        self.names, self.optional = names, tuple(i for i, t in enumerate(tensors) if t[0] == "?")
        self.linear, self.linear_results = linear, len(results) if linear_results is None else linear_results
        self.num_tensors = len(names)
        self.saves_output = saves_output
        self.differentiable = tuple(names.index(n) for n in differentiable)
        self.passes = None if passes is None else names.index(passes)
        self.shares = {names.index(n): names.index(like) for n, like in (shares or {}).items()}
        self.num_results = len(results)
        if saved is None:
            saved = {"logsumexp": lambda batch, heads, length, head_dim: (batch, heads, length)}
        self.saved = saved
        self._flops = flops or _score_flops
        everything = dict.fromkeys((*names, *results, *saved), "batch heads")
        axes = {**everything, **dict.fromkeys(parameters, "heads"), **(axes or {})}
        gradient_axes = {f"grad_{n}": axes[n] for n in (*differentiable, *results)}

        def whole_or_mixed(*args) -> str:
            return whole(*args) + (" batch" if mixes_batch(*args) else "")

        parameters = frozenset(names.index(n) for n in parameters)
        self.batched = lambda op: _fold_or_loop(op, parameters, self.num_tensors, mixes_batch)
        kept = [*(("output",) if saves_output else ()), *self.saved]
        self.num_kept = len(kept)

        returned = ", ".join(f"Tensor {n}" for n in (*results, *self.saved))
        first, *further = results
        upstream = ", ".join((f"Tensor grad_{first}", *(f"Tensor? grad_{n}" for n in further)))
        gradients = ", ".join(f"Tensor grad_{n}" for n in differentiable)
        again = ", ".join((upstream, inputs, *(f"Tensor {n}" for n in kept)))
        options = f", {options}" if options else ""
        self.forward = Op(
            f"{name}_fwd({inputs}{options}) -> ({returned})",
            fake or self._fake_forward,
            family=family,
            vmap=self.batched,
            flops=lambda *args, **kwargs: self._flops(*args[:3], *args[self.num_tensors :]),
            axes=axes,
            splits=splits,
            whole=whole_or_mixed,
        )
        # A parameter's gradient is summed over the batch, so folding would mix the mapped examples.
        received = self.num_results
        shifted = frozenset(i + received for i in parameters)
        self.backward = Op(
            f"{name}_bwd({again}{options}) -> ({gradients})",
            self._fake_backward,
            family=family,
            vmap=lambda op: _fold_or_loop(
                op,
                shifted,
                received + self.num_tensors + self.num_kept,
                lambda *args: bool(shifted) or mixes_batch(*args[received:]),
            ),
            flops=lambda *args, **kwargs: int(
                self._flops(*args[received:][:3], *args[received + self.num_tensors + self.num_kept :]) * backward_flops
            ),
            axes={**axes, **gradient_axes},
            splits=splits,
            whole=lambda *args: whole_or_mixed(
                *args[received:][: self.num_tensors], *args[received + self.num_tensors + self.num_kept :]
            ),
        )
        _operators[name] = self
        self.name = name

    def __call__(self, backend: str, *args):
        """Run the operator on ``backend``; differentiable. Its result, or a tuple where it has several."""
        call = self.forward
        if forward_ad._current_level >= 0:  # below autograd a tangent would be lost without a word
            call = functools.partial(_with_tangents().FusedTangent.apply, self.name)
        elif torch.is_grad_enabled():
            for index in (*self.differentiable, *self.shares, *(() if self.passes is None else (self.passes,))):
                if args[index] is not None and args[index].requires_grad:
                    call = functools.partial(Fused.apply, self.name)
                    break
        results = call(backend, *args)
        if isinstance(results, torch.Tensor):  # nothing is saved
            return results
        return results[0] if self.num_results == 1 else results[: self.num_results]

    def _fake_forward(self, query, *args):
        saved = (query.new_empty(shape(*query.shape), dtype=torch.float32) for shape in self.saved.values())
        return (torch.empty_like(query), *saved) if self.saved else torch.empty_like(query)

    def _fake_backward(self, grad_output, *args):
        absent = grad_output.new_empty
        args = args[self.num_results - 1 :]
        gradients = tuple(
            torch.empty_like(args[i]) if args[i] is not None else absent((0,), dtype=torch.float32)
            for i in self.differentiable
        )
        return gradients if len(gradients) > 1 else gradients[0]


def _score_flops(query, key, value, *options) -> int:
    """Two products of scores' size; a multiply-add is two."""
    batch, heads, length, head_dim = query
    return 4 * batch * heads * length * key[2] * head_dim


def signed(forward: Callable) -> Callable:
    """torch binds the arguments of every call to this signature; without the attribute it builds one each time (10 us)."""
    forward.__signature__ = inspect.signature(forward)
    return forward


class Fused(torch.autograd.Function):
    """Any operator with its backward. Operators go by name: Dynamo traces a global table, not a captured object."""

    generate_vmap_rule = True

    @staticmethod
    @signed
    def forward(name, backend, *args):
        return _operators[name].forward(backend, *args)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        name, backend, *args = inputs
        operator = _operators[name]
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        count = operator.num_tensors
        ctx.name, ctx.backend, ctx.options = name, backend, args[count:]
        saved = outputs[operator.num_results :]
        ctx.save_for_backward(*saved_of(operator, inputs, outputs))
        if saved:
            ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(operator.num_results == 1)
        if operator.num_results > 1:
            ctx.output_shape = outputs[0].shape

    @staticmethod
    def backward(ctx, *gradients):
        operator = _operators[ctx.name]
        received = operator.num_results
        grad_output, *further = gradients[:received]
        if grad_output is None:
            grad_output = ctx.saved_tensors[0].new_zeros(ctx.output_shape)
        arguments = (grad_output, *further, *ctx.saved_tensors, *ctx.options)
        gradients = run_backward(operator.backward, ctx.backend, *arguments)
        gradients = (gradients,) if isinstance(gradients, torch.Tensor) else gradients
        slots = [None] * (2 + operator.num_tensors + len(ctx.options))
        for index, gradient in zip(operator.differentiable, gradients):
            if arguments[received + index] is not None:
                slots[2 + index] = gradient
        if operator.passes is not None:
            slots[2 + operator.passes] = grad_output
        for index, like in operator.shares.items():
            if arguments[received + index] is not None:
                slots[2 + index] = slots[2 + like]
        return tuple(slots)


def saved_of(operator: Operator, inputs: tuple, outputs: tuple) -> tuple:
    """The tensors that a call's derivatives need."""
    output = outputs[:1] if operator.saves_output else ()
    return (*inputs[2 : 2 + operator.num_tensors], *output, *outputs[operator.num_results :])


def tangent_refusal(operator: str, name: str, linear: tuple[str, ...]) -> str:
    """What an argument's tangent is answered where no kernel takes it."""
    known = f"; they have that of {', '.join(linear)}" if linear else ""
    return (
        f"{operator}: effattn's kernels have no forward-mode derivative with respect to {name}{known}. "
        "backend='reference' has"
    )


class FusedGradient(torch.autograd.Function):
    """A backward op as a node of a graph: an attempt to differentiate it again fails instead of giving zeros."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name, backend, *args):
        return _ops[name](backend, *args)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(NO_SECOND_DERIVATIVE)


def run_backward(op: Op, backend: str, *args):
    """Run a backward op, so that a further derivative (create_graph=True, torch.func, forward mode) is refused."""
    if forward_ad._current_level >= 0:
        return _with_tangents().RefusedTangent.apply(op.name, backend, *args)
    if torch.is_grad_enabled():
        return FusedGradient.apply(op.name, backend, *args)
    return op(backend, *args)


def _with_tangents():
    return importlib.import_module("effattn._tangents")


# ---- vmap: fold the mapped dimension into the batch; loop where that would mix examples ----


def _loop(op) -> Callable:
    def rule(info, in_dims, *args):
        def example(index: int):
            return op(*(a if dim is None else a.select(dim, index) for a, dim in zip(args, in_dims)))

        results = [example(index) for index in range(info.batch_size)]
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results), 0
        outputs = tuple(torch.stack(parts) for parts in zip(*results))
        return outputs, (0,) * len(outputs)

    return rule


def _fold_or_loop(op, parameters: frozenset[int], num_tensors: int, mixes_batch: Callable[..., bool]) -> Callable:
    loop = _loop(op)

    def rule(info, in_dims, *args):
        if mixes_batch(*args) or any(in_dims[i] is not None for i in parameters):
            return loop(info, in_dims, *args)
        folded = list(args)
        for i in range(num_tensors):
            if i in parameters or args[i] is None:
                continue
            dim = in_dims[i]
            moved = args[i].movedim(dim, 0) if dim is not None else args[i].expand(info.batch_size, *args[i].shape)
            folded[i] = moved.flatten(0, 1)
        outputs = op(*folded)
        if isinstance(outputs, torch.Tensor):
            return outputs.unflatten(0, (info.batch_size, outputs.shape[0] // info.batch_size)), 0
        outputs = tuple(t.unflatten(0, (info.batch_size, t.shape[0] // info.batch_size)) for t in outputs)
        return outputs, (0,) * len(outputs)

    return rule
