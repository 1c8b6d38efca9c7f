"""Forward-mode derivatives: of the tensors that an operator is linear in, by the operator's own kernel.

Apart from `_library.Fused` because torch.compile takes no Function with a `jvp`; `_library` comes here only where
forward-mode differentiation is on.
"""

from __future__ import annotations

import functools

import torch

from ._library import NO_SECOND_DERIVATIVE, Fused, FusedGradient, Operator, _operators, saved_of, tangent_refusal


class FusedTangent(Fused):
    """Any operator, under forward-mode differentiation."""

    generate_vmap_rule = False  # torch's own rule loses count of the tangents of several outputs

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        Fused.setup_context(ctx, inputs, outputs)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        ctx.save_for_forward(*saved_of(_operators[inputs[0]], inputs, outputs))
        ctx.set_materialize_grads(False)
        ctx.output_shape = outputs[0].shape

    @staticmethod
    def vmap(info, in_dims, name, backend, *args):
        rule = _operators[name].batched(functools.partial(FusedTangent.apply, name, backend))
        return rule(info, in_dims[2:], *args)

    @staticmethod
    def jvp(ctx, _name, _backend, *tangents):
        operator = _operators[ctx.name]
        count = operator.num_tensors
        arguments = (*ctx.saved_tensors[:count], *ctx.options)
        along = _along_linear(operator, arguments, tangents[:count])
        found = operator(ctx.backend, *along)  # an operator again, so that tangents have gradients and tangents
        found = (found,) if isinstance(found, torch.Tensor) else found
        constant = (torch.zeros_like(f) for f in found[operator.linear_results :])
        return (*found[: operator.linear_results], *constant, *(None for _ in operator.saved))


class RefusedTangent(FusedGradient):
    """A backward op, under forward-mode differentiation."""

    @staticmethod
    def jvp(ctx, *_):
        raise NotImplementedError(NO_SECOND_DERIVATIVE)


def _along_linear(operator: Operator, arguments: tuple, tangents: tuple) -> list:
    """The arguments with the tangents of all that the operator is jointly linear in, in their place."""
    linear = operator.linear(*arguments) if callable(operator.linear) else operator.linear
    given = list(arguments)
    for index, (name, tangent) in enumerate(zip(operator.names, tangents)):
        if name not in linear:
            if tangent is not None:
                raise NotImplementedError(tangent_refusal(operator.name, name, linear))
            continue
        if tangent is None and index not in operator.optional:
            tangent = torch.zeros_like(arguments[index])
        given[index] = tangent
    return given
