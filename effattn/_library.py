"""Declares fused operators to torch: schema, shape rule, autograd, vmap and FLOP count, once per operator.

An operator ``X`` is two torch ops, ``X_fwd`` and ``X_bwd``. They are declared with one schema in every namespace:

    effattn::X_fwd         compiled kernels, found by dispatch key (CPU from _cpu.so, CUDA from _cuda.so)
    effattn_triton::X_fwd  Triton launchers of the same name in effattn.triton_kernels.<family>

so a backend is a namespace, and whatever sees torch ops (compile, export, FakeTensor, profiler, FLOP counter) sees all.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable

import torch

from . import _flops

NAMESPACES = {"cpu": "effattn", "cuda": "effattn", "triton": "effattn_triton"}

_libraries = {namespace: torch.library.Library(namespace, "FRAGMENT") for namespace in set(NAMESPACES.values())}
_operators: dict[str, Operator] = {}


class Operator:
    """A differentiable attention operator whose kernels return ``(output, logsumexp)``.

    Args:
        name: ``X`` above.
        family: module of ``effattn.triton_kernels`` that launches it.
        tensors: its tensor arguments, query, key and value first; a leading ``?`` marks an optional one.
        differentiable: those of them that receive a gradient, in the order in which ``X_bwd`` returns it.
        parameters: those of them that have no batch dimension.
        options: schema of the remaining arguments.
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
    ):
        self.name, self.family = name, family
        names = [tensor.removeprefix("?") for tensor in tensors]
        inputs = ", ".join(f"Tensor{'?' if t[0] == '?' else ''} {n}" for t, n in zip(tensors, names))
        self.num_tensors = len(names)
        self.differentiable = tuple(names.index(n) for n in differentiable)
        self.parameters = frozenset(names.index(n) for n in parameters)
        grads = ", ".join(f"Tensor grad_{n}" for n in differentiable)
        forward = f"{name}_fwd({inputs}, {options}) -> (Tensor output, Tensor logsumexp)"
        backward = f"{name}_bwd(Tensor grad_output, {inputs}, Tensor output, Tensor logsumexp, {options}) -> ({grads})"
        for namespace, library in _libraries.items():
            for schema, fake, batched, flops in (
                (forward, self._fake_forward, self._vmap_forward, self._flops_forward),
                (backward, self._fake_backward, self._vmap_backward, self._flops_backward),
            ):
                library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
                op_name = schema[: schema.index("(")]
                qualified = f"{namespace}::{op_name}"
                torch.library.register_fake(qualified, fake, lib=library)
                op = getattr(getattr(torch.ops, namespace), op_name)
                torch.library.register_vmap(qualified, batched(op.default), lib=library)
                _flops.register(op, flops)
                if namespace == "effattn_triton":
                    for key in ("CPU", "CUDA"):
                        library.impl(op_name, _triton_launcher(family, op_name), key)
        self._ops = {
            (backend, direction): getattr(getattr(torch.ops, namespace), f"{name}_{direction}").default
            for backend, namespace in NAMESPACES.items()
            for direction in ("fwd", "bwd")
        }
        _operators[name] = self

    def op(self, backend: str, direction: str) -> torch._ops.OpOverload:
        """The torch op that ``backend`` runs for ``direction`` ("fwd" or "bwd")."""
        return self._ops[backend, direction]

    def __call__(self, backend: str, *args) -> torch.Tensor:
        """Run the operator on ``backend``; differentiable."""
        if torch.is_grad_enabled():
            for index in self.differentiable:
                if args[index].requires_grad:
                    return Fused.apply(self.name, backend, *args)[0]
        return self._ops[backend, "fwd"](*args)[0]

    # ---- shapes ----

    def _fake_forward(self, query, *args):
        batch, heads, length, _ = query.shape
        return torch.empty_like(query), query.new_empty((batch, heads, length), dtype=torch.float32)

    def _fake_backward(self, grad_output, *args):
        return tuple(torch.empty_like(args[i]) for i in self.differentiable)

    # ---- vmap: fold the mapped dimension into the batch; loop where a parameter is mapped ----

    def _vmap_forward(self, op):
        return _fold_or_loop(op, self.parameters, self.num_tensors, loop_always=False)

    def _vmap_backward(self, op):
        # A parameter's gradient is summed over the batch, so folding would mix the mapped examples.
        parameters = frozenset(i + 1 for i in self.parameters)
        return _fold_or_loop(op, parameters, self.num_tensors + 3, loop_always=bool(parameters))

    # ---- FLOPs: two matrix products forward; five backward, for scores are recomputed ----

    @staticmethod
    def _flops_forward(query_shape, key_shape, *args, out_shape=None, **kwargs) -> int:
        batch, heads, length, head_dim = query_shape
        return 4 * batch * heads * length * key_shape[2] * head_dim

    @classmethod
    def _flops_backward(cls, grad_output_shape, query_shape, key_shape, *args, out_shape=None, **kwargs) -> int:
        return cls._flops_forward(query_shape, key_shape) * 5 // 2


def _triton_launcher(family: str, name: str) -> Callable:
    def launch(*args):
        return getattr(importlib.import_module(f"effattn.triton_kernels.{family}"), name)(*args)

    return launch


class Fused(torch.autograd.Function):
    """Any operator with its backward. Operators go by name: Dynamo traces a global table, not a captured object."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name, backend, *args):
        return _operators[name].op(backend, "fwd")(*args)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        name, backend, *args = inputs
        output, logsumexp = outputs
        count = _operators[name].num_tensors
        ctx.name, ctx.backend, ctx.options = name, backend, args[count:]
        ctx.save_for_backward(*args[:count], output, logsumexp)
        ctx.mark_non_differentiable(logsumexp)

    @staticmethod
    def backward(ctx, grad_output, _):
        operator = _operators[ctx.name]
        arguments = (grad_output, *ctx.saved_tensors, *ctx.options)
        if torch.is_grad_enabled():  # create_graph=True, or torch.func.grad
            gradients = FusedGradient.apply(ctx.name, ctx.backend, *arguments)
        else:
            gradients = operator.op(ctx.backend, "bwd")(*arguments)
        slots = [None] * (2 + operator.num_tensors + len(ctx.options))
        for index, gradient in zip(operator.differentiable, gradients):
            slots[2 + index] = gradient
        return tuple(slots)


# torch binds the arguments of every call to this signature; without the attribute it builds one each time (10 us).
Fused.forward.__signature__ = inspect.signature(Fused.forward)


class FusedGradient(torch.autograd.Function):
    """The backward op as a node of a graph: an attempt to differentiate it again fails instead of giving zeros."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name, backend, *args):
        return _operators[name].op(backend, "bwd")(*args)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError("effattn's kernels have no second derivative; backend='reference' has")


def _fold_or_loop(op, parameters: frozenset[int], num_tensors: int, *, loop_always: bool) -> Callable:
    def rule(info, in_dims, *args):
        mapped = [i for i in range(num_tensors) if in_dims[i] is not None]
        if loop_always or any(i in parameters for i in mapped):
            results = []
            for index in range(info.batch_size):
                example = [a.select(in_dims[i], index) if i in mapped else a for i, a in enumerate(args)]
                results.append(op(*example))
            outputs = tuple(torch.stack(parts) for parts in zip(*results))
        else:
            folded = list(args)
            for i in range(num_tensors):
                if i in parameters or args[i] is None:
                    continue
                dim = in_dims[i]
                moved = args[i].movedim(dim, 0) if dim is not None else args[i].expand(info.batch_size, *args[i].shape)
                folded[i] = moved.flatten(0, 1)
            outputs = tuple(t.unflatten(0, (info.batch_size, t.shape[0] // info.batch_size)) for t in op(*folded))
        return outputs, (0,) * len(outputs)

    return rule
