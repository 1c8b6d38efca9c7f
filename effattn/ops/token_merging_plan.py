"""A plan of merging tokens, and what is done by it."""

from __future__ import annotations

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from .. import _checks, reference
from .._library import Operator
from .._registry import REFERENCE, Backend, Problem, choose, cpu_kernel, cuda_kernel, register, triton_kernel
from ..reference.token_merging import MODES, group
from .retention_checks import is_plain

_PLAN = ("x", "source", "members", "offsets")
_BY_EXAMPLE = dict.fromkeys((*_PLAN, "output"), "batch")
_BY_CHANNEL = {**_BY_EXAMPLE, **dict.fromkeys(("x", "output"), "batch tokens channels")}


def _outputs(x: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], offsets.shape[1] - 1, x.shape[2]))


def _flops(x, *shapes_and_options) -> int:
    return 2 * x[0] * x[1] * x[2]


merge_op = Operator(
    "token_merge",
    family="token_merging",
    tensors=_PLAN,
    differentiable=("x",),
    linear=lambda *args: () if MODES[args[-1]] == "max" else ("x",),
    options="int mode",
    saved={},
    fake=lambda x, source, members, offsets, mode: _outputs(x, offsets),
    flops=_flops,
    backward_flops=1,
    axes=_BY_CHANNEL,
    splits="batch channels",
)
"""Mean, sum or maximum (an index of MODES) over the members of each output: (B, N, C) -> (B, T, C) contiguous.

The maximum's gradient is shared evenly by the members that attain it. An output without members is 0.
"""

weighted_op = Operator(
    "token_merge_weighted",
    family="token_merging",
    tensors=(*_PLAN, "?residual", "?sizes"),
    differentiable=("x", "sizes"),
    shares={"residual": "x"},
    linear=("x", "residual"),
    linear_results=1,
    options="bool wants_sizes",
    results=("output", "merged_sizes"),
    saved={},
    fake=lambda x, source, members, offsets, residual, sizes, wants_sizes: (
        _outputs(x, offsets),
        x.new_empty((x.shape[0], offsets.shape[1] - 1), dtype=torch.float32),
    ),
    flops=_flops,
    backward_flops=1,
    axes={**_BY_EXAMPLE, **dict.fromkeys(("residual", "sizes", "merged_sizes"), "batch")},
    splits="batch",
)
"""y_t = sum s_i (x_i + residual_i) / S_t, S_t = sum s_i over the members of t; 0 where S_t = 0.

sizes (B, N) contiguous float32, absent: ones. residual: x's dtype and shape, any strides. Without wants_sizes the
gradient of sizes is zeros.
"""

unmerge_op = Operator(
    "token_unmerge",
    family="token_merging",
    tensors=_PLAN,
    differentiable=("x",),
    linear=("x",),
    options="",
    saved={},
    saves_output=False,
    fake=lambda x, source, members, offsets: x.new_empty((*source.shape, x.shape[2])),
    flops=lambda x, source, *rest: source[0] * source[1] * x[2],
    backward_flops=1,
    axes=_BY_CHANNEL,
    splits="batch channels",
)
"""Row i of (B, N, C) is row source_i of x (B, T, C)."""

for _name in ("merge", "merge_weighted", "unmerge"):
    register(
        f"TokenMerge.{_name}",
        (Backend("cuda", cuda_kernel), Backend("cpu", cpu_kernel), Backend("triton", triton_kernel), REFERENCE),
    )


class TokenMerge:
    r"""A plan of merging tokens: which of N tokens go to which of T, for each example of a batch. Its methods carry it out.

    :func:`effattn.bipartite_soft_matching` makes plans. A plan is index tensors of fixed shape, a pytree, so it passes
    through ``torch.compile``, ``torch.export`` and ``torch.vmap``. Choosing it has no gradient; carrying it out has.

    Args:
        source: (B, N) int32, the output token of each input.
        members: (B, N) int32, the inputs in the order of their outputs, ascending within each.
        offsets: (B, T + 1) int32, where the members of each output begin. An output without members is padding.
        sizes: (B, N) or (B, N, 1), how many patches each input stands for, or None: the default of ``merge_weighted``.
        padded: whether outputs may be padding.

    Raises:
        TypeError, ValueError: the methods, of a wrong argument; the message names it.

    Source:
        Token Merging: Your ViT But Faster (ToMe), arXiv 2210.09461.

    Example:
        >>> import torch, effattn
        >>> tokens = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.0]]])
        >>> plan = effattn.bipartite_soft_matching(tokens, 1)
        >>> plan.source_map()  # tokens 0 and 1 are merged
        tensor([[1, 1, 0, 2]])
        >>> merged, sizes = plan.merge_weighted(tokens)
        >>> sizes.squeeze(-1)
        tensor([[1., 2., 1.]])
    """

    __slots__ = ("_checked", "members", "offsets", "padded", "sizes", "source")

    def __init__(
        self, source: Tensor, members: Tensor, offsets: Tensor, sizes: Tensor | None = None, padded: bool = False
    ):
        self.source, self.members, self.offsets, self.sizes, self.padded = source, members, offsets, sizes, padded
        self._checked = False

    @property
    def num_tokens(self) -> int:
        """T, the number of output tokens, padding included."""
        return self.offsets.shape[1] - 1

    @property
    def valid(self) -> Tensor | None:
        """(B, T) bool, False where an output is padding; None where none is."""
        return self.offsets.diff() > 0 if self.padded else None

    @property
    def _is_identity(self) -> bool:
        return not self.padded and self.num_tokens == self.source.shape[1]

    def __repr__(self) -> str:
        batch, tokens = self.source.shape
        return f"TokenMerge(batch={batch}, {tokens} -> {self.num_tokens} tokens{', padded' if self.padded else ''})"

    def source_map(self) -> Tensor:
        """(B, N) int64: which output token each input went to."""
        return self.source.long()

    def merge(self, x: Tensor, mode: str = "mean", *, backend: str = "auto") -> Tensor:
        r"""Mean, sum or maximum of the tokens that go to each output.

        .. math:: y_t = \frac{1}{n_t} \sum_{i \to t} x_i \quad\text{or}\quad \sum_{i \to t} x_i
                  \quad\text{or}\quad \max_{i \to t} x_i

        Args:
            x: (B, N, C), float32, bfloat16, float16 or float64 (float64: reference only), any strides.
            mode: "mean", "sum" or "max".
            backend: "auto", "cuda", "triton", "cpu" or "reference"; an explicit backend never falls back.

        Returns:
            Tensor: (B, T, C), x's dtype, 0 in padding. Differentiable; a maximum's gradient is shared evenly by the
            tokens that attain it. The identity plan returns x itself.

        Raises:
            TypeError, ValueError: an argument is wrong; the message names it.
            NotImplementedError: the explicit ``backend`` cannot serve this call; the message says why.

        Source:
            arXiv 2210.09461, appendix D.
        """
        op = "TokenMerge.merge"
        self._check(op, x)
        _checks.one_of(op, "mode", mode, MODES)
        backend = self._choose(op, backend, x)
        if self._is_identity:
            return x
        if backend == "reference":
            return reference.token_merge(x, self.source, self.offsets, mode)
        return merge_op(backend, x, self.source, self.members, self.offsets, MODES.index(mode))

    def merge_weighted(
        self, x: Tensor, sizes: Tensor | None = None, *, residual: Tensor | None = None, backend: str = "auto"
    ) -> tuple[Tensor, Tensor]:
        r"""Average of the tokens that go to each output, weighted by how many patches each stands for, and the new sizes.

        .. math:: y_t = \frac{1}{S_t} \sum_{i \to t} s_i (x_i + \text{residual}_i), \qquad S_t = \sum_{i \to t} s_i

        Args:
            x: (B, N, C), float32, bfloat16, float16 or float64 (float64: reference only), any strides.
            sizes: (B, N) or (B, N, 1), any real dtype; None: the plan's, or ones.
            residual: added to x first, x's shape and dtype: ``x + residual`` in the same pass.
            backend: "auto", "cuda", "triton", "cpu" or "reference"; an explicit backend never falls back.

        Returns:
            tuple[Tensor, Tensor]: (B, T, C), x's dtype, and the sizes, (B, T) or (B, T, 1) as given, their dtype as given;
            (B, T, 1) float32 for None. Both 0 in padding. Differentiable in x, residual and sizes.

        Raises:
            TypeError, ValueError: an argument is wrong; the message names it.
            NotImplementedError: the explicit ``backend`` cannot serve this call; the message says why.

        Source:
            arXiv 2210.09461, section 3.
        """
        op = "TokenMerge.merge_weighted"
        tokens = self._check(op, x)
        if residual is not None:
            _checks.parameter(op, "residual", residual, x, "x")
            if residual.shape != x.shape or residual.dtype != x.dtype:
                raise ValueError(
                    f"{op}: residual must have x's shape {tuple(x.shape)} and dtype {x.dtype}, got "
                    f"{tuple(residual.shape)} and {residual.dtype}"
                )
        sizes = self.sizes if sizes is None else sizes
        flat = None if sizes is None else flat_sizes(op, sizes, x, (x.shape[0], tokens), "x")
        backend = self._choose(op, backend, x)
        if self._is_identity:
            merged = x if residual is None else x + residual
            return merged, x.new_ones((*x.shape[:2], 1), dtype=torch.float32) if sizes is None else sizes
        if backend == "reference":
            merged, totals = reference.token_merge_weighted(
                *(x, self.source, self.offsets, residual),
                None if flat is None else flat.to(torch.promote_types(x.dtype, torch.float32)),
            )
        else:
            flat = None if flat is None else flat.float().contiguous()
            wanted = flat is not None and torch.is_grad_enabled() and flat.requires_grad
            merged, totals = weighted_op(*(backend, x, self.source, self.members, self.offsets, residual, flat), wanted)
        if sizes is None:
            return merged, totals.unsqueeze(-1)
        return merged, totals.to(sizes.dtype).reshape(*totals.shape, *sizes.shape[2:])

    def unmerge(self, x: Tensor, *, backend: str = "auto") -> Tensor:
        r"""Give every input token the row of the output that it went to.

        .. math:: x_i = y_{t(i)}

        Args:
            x: (B, T, C), float32, bfloat16, float16 or float64 (float64: reference only), any strides.
            backend: "auto", "cuda", "triton", "cpu" or "reference"; an explicit backend never falls back.

        Returns:
            Tensor: (B, N, C), x's dtype. Differentiable. The identity plan returns x itself.

        Raises:
            TypeError, ValueError: an argument is wrong; the message names it.
            NotImplementedError: the explicit ``backend`` cannot serve this call; the message says why.

        Source:
            arXiv 2210.09461, appendix D.
        """
        op = "TokenMerge.unmerge"
        self._check(op, x, outputs=True)
        backend = self._choose(op, backend, x)
        if self._is_identity:
            return x
        if backend == "reference":
            return reference.token_unmerge(x, self.source)
        return unmerge_op(backend, x, self.source, self.members, self.offsets)

    def _check(self, op: str, x: Tensor, outputs: bool = False) -> int:
        """Of x; returns how many tokens it has."""
        if not self._checked:
            self._check_plan(op)
        _checks.floating(op, "x", x)
        tokens = self.num_tokens if outputs else self.source.shape[1]
        batch = self.source.shape[0]
        if x.dim() != 3 or x.shape[0] != batch or x.shape[1] != tokens:
            raise ValueError(
                f"{op}: x must have shape ({batch}, {tokens}, channels), as this plan has, got {tuple(x.shape)}"
            )
        if x.device != self.source.device:
            raise ValueError(f"{op}: x must be on the plan's device {self.source.device}, got {x.device}")
        return tokens

    def _check_plan(self, op: str) -> None:
        """Of a plan that somebody else put together; its values only where they can be looked at."""
        given = (("source", self.source), ("members", self.members), ("offsets", self.offsets))
        for name, tensor in given:
            _checks.strided(op, name, tensor)
            if tensor.dtype != torch.int32:
                raise TypeError(f"{op}: {name} must be int32, got {tensor.dtype}")
            if tensor.dim() != 2:
                raise ValueError(f"{op}: {name} must have shape (batch, tokens), got {tuple(tensor.shape)}")
            if tensor.device != self.source.device:
                raise ValueError(f"{op}: {name} must be on source's device {self.source.device}, got {tensor.device}")
        _checks.boolean(op, "padded", self.padded)
        batch = self.source.shape[0]
        if self.members.shape != self.source.shape:
            raise ValueError(
                f"{op}: members must have source's shape {tuple(self.source.shape)}, got {tuple(self.members.shape)}"
            )
        if self.offsets.shape[0] != batch or self.offsets.shape[1] < 1:
            raise ValueError(f"{op}: offsets must have shape ({batch}, outputs + 1), got {tuple(self.offsets.shape)}")
        self.source, self.members, self.offsets = (tensor.contiguous() for _, tensor in given)
        if all(is_plain(tensor) for _, tensor in given):
            source = self.source.long()
            if source.numel() and not 0 <= source.min() <= source.max() < self.num_tokens:
                raise ValueError(f"{op}: source must be in 0..{self.num_tokens - 1}, the outputs that offsets has")
            for name, tensor, wanted in zip(("members", "offsets"), (self.members, self.offsets), _grouped(self)):
                if not torch.equal(tensor, wanted):
                    raise ValueError(f"{op}: {name} must be that of source, inputs in the order of their outputs")
            self._checked = True

    def _choose(self, op: str, backend: str, x: Tensor) -> str:
        return choose(op, backend, Problem(x.device.type, x.dtype, 1))


def flat_sizes(op: str, sizes: Tensor, like: Tensor, shape: tuple[int, int], name: str) -> Tensor:
    """Sizes as (B, N), in their own dtype."""
    _checks.real_tensor(op, "sizes", sizes)
    if sizes.device != like.device:
        raise ValueError(f"{op}: sizes must be on {name}'s device {like.device}, got {sizes.device}")
    flat = sizes.squeeze(-1) if sizes.dim() == 3 and sizes.shape[2] == 1 else sizes
    if flat.shape != shape:
        raise ValueError(f"{op}: sizes must have shape {shape} or {(*shape, 1)}, got {tuple(sizes.shape)}")
    return flat


def _grouped(plan: TokenMerge) -> tuple[Tensor, Tensor]:
    return group(plan.source.long(), plan.num_tokens)[1:]


def _flatten(plan: TokenMerge):
    return [plan.source, plan.members, plan.offsets, plan.sizes], plan.padded


def _unflatten(tensors, padded: bool) -> TokenMerge:
    return TokenMerge(*tensors, padded=padded)


pytree.register_pytree_node(TokenMerge, _flatten, _unflatten, serialized_type_name="effattn.TokenMerge")
