"""What the suite needs to know of each registered operator, keyed by its name in the registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import effattn

from . import formulas
from .layouts import place


@dataclass(frozen=True)
class Shape:
    batch: int = 2
    heads: int = 3
    grid: tuple[int, int] = (4, 5)
    prefix: int = 1
    head_dim: int = 16
    gaussians: int = 5
    keys: int | None = None  # of operators whose keys are not the queries' tokens

    @property
    def tokens(self) -> int:
        return self.prefix + self.grid[0] * self.grid[1]

    @property
    def key_tokens(self) -> int:
        return self.tokens if self.keys is None else self.keys

    def __str__(self) -> str:  # in test names
        keys = "" if self.keys is None else f"x{self.keys}"
        height, width = self.grid
        return f"{self.batch}x{self.heads}x({self.prefix}+{height}*{width}){keys}x{self.head_dim}K{self.gaussians}"

    def with_(self, **changes) -> Shape:
        return replace(self, **changes)


@dataclass(frozen=True, repr=False)
class Case:
    """One public operator in one mode of use.

    Args:
        op: name in the registry.
        variant: the mode, where the operator has several.
        function: the public function, called as ``function(**tensors, **options, backend=...)``.
        sample: (shape, generator) -> its tensor arguments in float64 by name, query, key and value first.
        options: shape -> its other arguments by name.
        differentiable: the tensor arguments that receive a gradient from the kernels.
        parameters: the tensor arguments without a batch dimension.
        formula: the NumPy float64 formula on the same names.
        flops: shape -> FLOPs of the forward by the operator's convention.
        bad: (why, changes of the arguments, exception, what its message must say).
        in_float32: the tensor arguments that stay float32 whatever query's dtype.
        not_autocast: those that come in query's dtype, but that autocast leaves in theirs.
        straight_through: those whose gradient is by definition not the derivative.
        mixes_batch: whether an example's result depends on the rest of its batch.
        takes_dropout: whether the function has a dropout_p.
        even_heads: whether the number of heads must be even; a shape's is rounded up.
        same_kernels: whether another operator of the table runs the same kernels, so that slow backends skip this one.
        launches: of how many ops a call consists.
        grids: three grids that, after two prefix tokens, one compiled graph serves.
    """

    op: str
    variant: str
    function: Callable = field(repr=False)
    sample: Callable[[Shape, torch.Generator], dict[str, Tensor]] = field(repr=False)
    options: Callable[[Shape], dict] = field(repr=False)
    differentiable: tuple[str, ...] = field(repr=False)
    formula: Callable = field(repr=False)
    flops: Callable[[Shape], int] = field(repr=False)
    parameters: tuple[str, ...] = field(default=(), repr=False)
    bad: tuple[tuple[str, Callable[[dict], dict], type, str], ...] = field(default=(), repr=False)
    in_float32: tuple[str, ...] = field(default=(), repr=False)
    not_autocast: tuple[str, ...] = field(default=(), repr=False)
    straight_through: tuple[str, ...] = field(default=(), repr=False)
    mixes_batch: bool = field(default=False, repr=False)
    takes_dropout: bool = field(default=True, repr=False)
    even_heads: bool = field(default=False, repr=False)
    same_kernels: bool = field(default=False, repr=False)
    launches: int = field(default=1, repr=False)
    grids: tuple = field(default=((3, 4), (5, 6), (7, 3)), repr=False)

    def __str__(self) -> str:
        return f"{self.op}[{self.variant}]" if self.variant else self.op

    def with_(self, **changes) -> Case:
        return replace(self, **changes)

    def heads(self, shape: Shape) -> int:
        return shape.heads + shape.heads % 2 if self.even_heads else shape.heads

    __repr__ = __str__

    def __call__(self, tensors: dict[str, Tensor], options: dict, backend: str) -> Tensor:
        return self.function(**tensors, **options, backend=backend)

    def tensors(
        self,
        shape: Shape,
        dtype: torch.dtype = torch.float32,
        layouts: str | tuple[str, str, str] | None = None,
        seed: int = 0,
        device: str = "cpu",
    ) -> dict[str, Tensor]:
        """Sample arguments; with ``layouts`` each lies in a NaN-filled storage, query, key and value as it says."""
        drawn = self.sample(shape.with_(heads=self.heads(shape)), torch.Generator().manual_seed(seed))
        layouts = (layouts,) * 3 if isinstance(layouts, str) else layouts
        of = dict(zip(("query", "key", "value"), layouts)) if layouts else {}
        out = {}
        for name, tensor in drawn.items():
            if tensor.is_floating_point():
                keep = name in self.in_float32 and dtype != torch.float64
                tensor = tensor.to(torch.float32 if keep else dtype)
            tensor = tensor.to(device)
            out[name] = place(tensor, of.get(name, "contiguous")) if layouts else tensor
        return out

    def grad_output(self, shape: Shape, dtype=torch.float32, layout: str | None = None, device: str = "cpu") -> Tensor:
        size = (shape.batch, self.heads(shape), shape.tokens, shape.head_dim)
        drawn = torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype).to(device)
        return place(drawn, layout) if layout else drawn


def _qkv(shape: Shape, generator, kv_heads: int | None = None) -> dict[str, Tensor]:
    def normal(heads, tokens):
        return torch.randn(shape.batch, heads, tokens, shape.head_dim, generator=generator, dtype=torch.float64)

    kv_heads = shape.heads if kv_heads is None else kv_heads
    query = normal(shape.heads, shape.tokens)
    return {"query": query, "key": normal(kv_heads, shape.key_tokens), "value": normal(kv_heads, shape.key_tokens)}


def _normal(generator, *size) -> Tensor:
    return torch.randn(size, generator=generator, dtype=torch.float64)


def _scaled(factor: float | None, shape: Shape) -> dict:
    """An explicit scale, given as a multiple of the default so that the scores keep their size at every head_dim."""
    return {} if factor is None else {"scale": factor * shape.head_dim**-0.5}


def _square(shape: Shape) -> Shape:
    return shape.with_(keys=None)


def _two_products(shape: Shape) -> int:
    return 4 * shape.batch * shape.heads * shape.tokens * shape.key_tokens * shape.head_dim


def _two_square_products(shape: Shape) -> int:
    return _two_products(_square(shape))


# ---- bad arguments that every operator of query, key and value refuses ----


def _set(**changes) -> Callable[[dict], dict]:
    return lambda arguments: {**arguments, **changes}


def _map(name: str, change: Callable) -> Callable[[dict], dict]:
    return lambda arguments: {**arguments, name: change(arguments[name])}


BAD_TENSORS = (
    ("query that is no tensor", _set(query=[1.0]), TypeError, "query must be a Tensor"),
    ("key that is no tensor", _set(key=None), TypeError, "key must be a Tensor"),
    ("three-dimensional query", _map("query", lambda t: t[0]), ValueError, "query must have shape"),
    ("three-dimensional value", _map("value", lambda t: t[0]), ValueError, "value must have shape"),
    ("integer query", _map("query", torch.Tensor.int), TypeError, "query must be floating point"),
    ("complex key", _map("key", lambda t: t.to(torch.complex64)), TypeError, "key must be floating point"),
    ("key of another dtype", _map("key", torch.Tensor.half), TypeError, "key must have query's dtype"),
    ("value on another device", _map("value", lambda t: t.to("meta")), ValueError, "value must be on query's device"),
    ("key of another length", _map("key", lambda t: t[:, :, 1:]), ValueError, "key must have query's shape"),
    ("value of another head_dim", _map("value", lambda t: t[..., 1:]), ValueError, "value must have query's shape"),
    ("key of another batch", _map("key", lambda t: t[:1]), ValueError, "key must have query's shape"),
    (
        "head_dim of zero",
        lambda a: {**a, **{name: a[name][..., :0] for name in ("query", "key", "value")}},
        ValueError,
        "head_dim",
    ),
    ("unknown backend", _set(backend="tpu"), ValueError, "backend must be one of .*'tpu'"),
)

BAD_INPUTS = (
    *BAD_TENSORS,
    ("scale that is no number", _set(scale="big"), TypeError, "scale must be a number"),
    ("scale that is NaN", _set(scale=float("nan")), ValueError, "scale must be finite"),
    ("infinite scale", _set(scale=float("inf")), ValueError, "scale must be finite"),
    ("dropout_p of one", _set(dropout_p=1.0), ValueError, "dropout_p"),
    ("negative dropout_p", _set(dropout_p=-0.1), ValueError, "dropout_p"),
)

_BAD_MIXTURES = (
    ("grid that is no pair", _set(grid=(20,)), TypeError, "grid must be a pair"),
    ("grid that is a number", _set(grid=20), TypeError, "grid must be a pair"),
    ("grid of floats", _set(grid=(4.0, 5)), TypeError, "grid height must be an int"),
    ("negative grid", _set(grid=(4, -5)), ValueError, "grid width must be at least 0"),
    ("grid of another number of tokens", _set(grid=(4, 6)), ValueError, "grid 4 x 6"),
    ("negative num_prefix_tokens", _set(num_prefix_tokens=-1), ValueError, "num_prefix_tokens must be at least 0"),
    ("fractional num_prefix_tokens", _set(num_prefix_tokens=1.5), TypeError, "num_prefix_tokens must be an int"),
    ("alpha that is no tensor", _set(alpha=1.0), TypeError, "alpha must be a Tensor"),
    ("integer sigma", _map("sigma", torch.Tensor.int), TypeError, "sigma must be floating point"),
    ("one-dimensional alpha", _map("alpha", lambda t: t[0]), ValueError, "alpha must have shape"),
    ("alpha of other heads", _map("alpha", lambda t: t[:, 1:]), ValueError, "alpha must have shape"),
    ("no Gaussians", _map("alpha", lambda t: t[:0]), ValueError, "alpha must have shape"),
    ("sigma of another shape than alpha", _map("sigma", lambda t: t[1:]), ValueError, "sigma must have alpha's shape"),
    ("sigma on another device", _map("sigma", lambda t: t.to("meta")), ValueError, "sigma must be on query's device"),
    ("eps of zero", _set(eps=0.0), ValueError, "eps must be above 0"),
    ("eps that is NaN", _set(eps=float("nan")), ValueError, "eps must be finite"),
)

_BAD_WEIGHTS = (
    ("weight that is no tensor", _set(weight=1.0), TypeError, "weight must be a Tensor"),
    ("boolean weight", _map("weight", torch.Tensor.bool), TypeError, "weight must be floating point"),
    ("weight of other tokens", _map("weight", lambda t: t[..., 1:]), ValueError, "weight must have shape"),
    ("weight with a batch", _map("weight", lambda t: t.expand(1, 1, 1, *t.shape)), ValueError, "weight must have"),
    ("weight on another device", _map("weight", lambda t: t.to("meta")), ValueError, "weight must be on"),
)

_BAD_SHIFT_ADD = (
    ("unknown binarisation", _set(binarize="ternary"), ValueError, "binarize must be one of .*'ternary'"),
    ("residual_weight that is no tensor", _set(residual_weight=1.0), TypeError, "residual_weight must be a Tensor"),
    ("integer residual_weight", _map("residual_weight", torch.Tensor.int), TypeError, "must be floating point"),
    ("residual_weight of other heads", _map("residual_weight", lambda t: t[1:]), ValueError, "must have shape"),
    ("even number of taps", _map("residual_weight", lambda t: t[:, :, 1:]), ValueError, "T odd"),
    ("flat residual_weight", _map("residual_weight", lambda t: t[:, 0, :, 0]), ValueError, "must have shape"),
    ("residual_weight elsewhere", _map("residual_weight", lambda t: t.to("meta")), ValueError, "must be on query's"),
)

# Shapes and dtypes that do not fit are torch's to refuse: such a call goes to torch unchanged.
_BAD_SDPA = (
    ("unknown backend", _set(backend="tpu"), ValueError, "backend must be one of .*'tpu'"),
    ("query that is no tensor", _set(query=None), TypeError, "query must be a Tensor"),
    ("value that is no tensor", _set(value=1.0), TypeError, "value must be a Tensor"),
    ("scale that is no number", _set(scale="big"), TypeError, "scale must be a number"),
    ("mask of another kind", _set(attn_mask=[[True]]), TypeError, "attn_mask must be a Tensor or a structured mask"),
)


_BAD_WINDOWS = (
    ("grid of another number of tokens", _set(grid=(4, 6)), ValueError, "grid 4 x 6"),
    ("grid that is no pair", _set(grid=(20,)), TypeError, "grid must be a pair"),
    ("unknown padding", _set(padding="reflect"), ValueError, "padding must be one of .*'reflect'"),
    ("lepe_weight that is no tensor", _set(lepe_weight=1.0), TypeError, "lepe_weight must be a Tensor"),
    ("integer lepe_weight", _map("lepe_weight", torch.Tensor.int), TypeError, "lepe_weight must be floating point"),
    ("lepe_weight of other channels", _map("lepe_weight", lambda t: t[1:]), ValueError, "lepe_weight must have shape"),
    ("lepe_weight of 5 x 5", _map("lepe_weight", lambda t: t.new_ones(len(t), 1, 5, 5)), ValueError, "must have shape"),
    ("lepe_weight elsewhere", _map("lepe_weight", lambda t: t.to("meta")), ValueError, "must be on query's device"),
    ("lepe_bias of other channels", _map("lepe_bias", lambda t: t[1:]), ValueError, "lepe_bias must have shape"),
    ("lepe_bias without weight", _set(lepe_weight=None), ValueError, "lepe_bias must be None"),
)

_BAD_STRIPES = (
    ("stripe_width of zero", _set(stripe_width=0), ValueError, "stripe_width must be at least 1"),
    ("stripe_width that is no number", _set(stripe_width="2"), TypeError, "stripe_width must be an int"),
    ("stripes that do not divide", _set(stripe_width=2, padding="error"), ValueError, "do not divide the grid"),
)

_BAD_SHIFTS = (
    ("window that is no pair", _set(window=3), TypeError, "window must be a pair"),
    ("empty window", _set(window=(0, 2)), ValueError, "window height must be at least 1"),
    ("windows that do not divide", _set(padding="error"), ValueError, "do not divide"),
    ("shift of a whole window", _set(shift=(2, 0)), ValueError, "shift must be below window"),
    ("negative shift", _set(shift=(0, -1)), ValueError, "shift width must be at least 0"),
    ("shift with overlap", _set(overlap=(1, 1)), ValueError, r"overlap must be \(0, 0\) where shift"),
    ("unknown bias_index", _set(bias_index="swinv2"), ValueError, "bias_index must be one of .*'swinv2'"),
    ("bias_table that is no tensor", _set(bias_table=1.0), TypeError, "bias_table must be a Tensor"),
    ("bias_table of another window", _map("bias_table", lambda t: t[1:]), ValueError, "bias_table must have shape"),
    ("bias_table of other heads", _map("bias_table", lambda t: t[:, 1:]), ValueError, "bias_table must have shape"),
    ("bias_table elsewhere", _map("bias_table", lambda t: t.to("meta")), ValueError, "must be on query's device"),
)

_BAD_SIZES = (
    *(
        bad
        for bad in BAD_INPUTS
        if bad[0] not in ("key of another length", "value of another head_dim", "key of another batch")
    ),
    ("value of another length", _map("value", lambda t: t[:, :, 1:]), ValueError, "value must have shape"),
    ("key of another batch", _map("key", lambda t: t[:1]), ValueError, "key must have shape"),
    ("sizes that are no tensor", _set(sizes=1.0), TypeError, "sizes must be a Tensor"),
    ("complex sizes", _map("sizes", lambda t: t.to(torch.complex64)), TypeError, "sizes must be real"),
    ("sizes of other tokens", _map("sizes", lambda t: t[:, 1:]), ValueError, "sizes must have shape"),
    ("sizes of another batch", _map("sizes", lambda t: t[:1]), ValueError, "sizes must have shape"),
    ("sizes elsewhere", _map("sizes", lambda t: t.to("meta")), ValueError, "sizes must be on query's device"),
)

# ---- the table ----


def _mixture_sample(shape: Shape, generator) -> dict[str, Tensor]:
    size = (shape.gaussians, shape.heads)
    widths = 2 + 3 * _normal(generator, *size)  # both signs, so some are narrow and some wide beside these grids
    return {**_qkv(_square(shape), generator), "alpha": 2 * _normal(generator, *size), "sigma": widths}


def _mixture(variant: str, scale: float | None = None, **extra) -> Case:
    return Case(
        op="gaussian_mixture_attention",
        variant=variant,
        function=effattn.gaussian_mixture_attention,
        sample=_mixture_sample,
        options=lambda shape: {"grid": shape.grid, "num_prefix_tokens": shape.prefix, **_scaled(scale, shape), **extra},
        differentiable=("query", "key", "value", "alpha", "sigma"),
        parameters=("alpha", "sigma"),
        in_float32=("alpha", "sigma") if not variant else (),
        formula=formulas.gaussian_mixture_attention,
        flops=_two_square_products,
        bad=BAD_INPUTS + _BAD_MIXTURES,
    )


def _masked(variant: str, per_head: bool) -> Case:
    def sample(shape: Shape, generator):
        heads = (shape.heads,) if per_head else ()
        return {
            **_qkv(_square(shape), generator),
            "weight": 1 + _normal(generator, *heads, shape.tokens, shape.tokens),
        }

    return Case(
        op="masked_product_attention",
        variant=variant,
        function=effattn.masked_product_attention,
        sample=sample,
        options=lambda shape: _scaled(0.8 if per_head else None, shape),
        differentiable=("query", "key", "value", "weight"),
        parameters=("weight",),
        in_float32=("weight",) if per_head else (),
        formula=formulas.masked_product_attention,
        flops=_two_square_products,
        bad=BAD_INPUTS + _BAD_WEIGHTS,
    )


def _sdpa(variant: str, mask=None, kv_heads: int | None = None, scale: float | None = None, **options) -> Case:
    def sample(shape: Shape, generator):
        heads = shape.heads if kv_heads is None else min(kv_heads, shape.heads)
        tensors = _qkv(shape, generator, heads)
        return tensors if mask is None else {**tensors, "attn_mask": mask(shape, generator)}

    return Case(
        op="scaled_dot_product_attention",
        variant=variant,
        function=effattn.scaled_dot_product_attention,
        sample=sample,
        options=lambda shape: {**_scaled(scale, shape), **options},
        differentiable=("query", "key", "value"),
        formula=formulas.scaled_dot_product_attention,
        flops=_two_products,
        bad=_BAD_SDPA if mask is None and not options else (),
    )


def _boolean_mask(shape: Shape, generator) -> Tensor:
    mask = _normal(generator, shape.batch, 1, shape.tokens, shape.key_tokens) > -0.5
    mask[:, :, 1::4] = False  # rows with nothing to attend to
    return mask


def _additive_mask(shape: Shape, generator) -> Tensor:
    mask = _normal(generator, shape.batch, shape.heads, shape.tokens, shape.key_tokens)
    return mask.masked_fill(mask > 1.0, float("-inf"))


def _shift_add(variant: str, binarize: str, taps: int | None) -> Case:
    def sample(shape: Shape, generator):
        weight = {} if taps is None else {"residual_weight": _normal(generator, shape.heads, 1, taps, 1)}
        return {**_qkv(_square(shape), generator), **weight}

    residual = () if taps is None else ("residual_weight",)
    return Case(
        op="shift_add_attention",
        variant=variant,
        function=effattn.shift_add_attention,
        sample=sample,
        options=lambda shape: {"binarize": binarize},
        differentiable=("query", "key", "value", *residual),
        parameters=residual,
        in_float32=residual,
        formula=formulas.shift_add_attention,
        flops=lambda shape: 4 * shape.batch * shape.heads * shape.tokens * shape.head_dim**2,
        bad=BAD_TENSORS + _BAD_SHIFT_ADD if residual else (),
        straight_through=("query", "key"),
        mixes_batch=binarize in ("published", "mean_threshold"),
        takes_dropout=False,
    )


def _rectangle(tokens: int) -> tuple[int, int]:
    """A grid of so many tokens, as square as can be."""
    height = max((h for h in range(1, int(tokens**0.5) + 1) if tokens % h == 0), default=0)
    return height, tokens // height if height else 3


def _window_flops(shape: Shape, heads: int, keys: tuple[int, int]) -> int:
    """Of both products, where heads of the first and second half have so many keys a query."""
    pairs = heads // 2 * keys[0] + (heads - heads // 2) * keys[1]
    return 4 * shape.batch * shape.tokens * shape.head_dim * pairs


def _token_sizes(variant: str, scale: float | None = None) -> Case:
    """Without a variant some sizes are 0; "column" sizes are (B, M, 1), all above 0 and in query's dtype."""

    def sample(shape: Shape, generator):
        sizes = 1 + 3 * torch.rand(shape.batch, shape.key_tokens, generator=generator, dtype=torch.float64)
        if not variant:
            sizes[:, 1::3] = 0
        return {**_qkv(shape, generator), "sizes": sizes.unsqueeze(-1) if variant else sizes}

    return Case(
        op="size_weighted_attention",
        variant=variant,
        function=effattn.size_weighted_attention,
        sample=sample,
        options=lambda shape: _scaled(scale, shape),
        differentiable=("query", "key", "value", "sizes") if variant else ("query", "key", "value"),
        in_float32=() if variant else ("sizes",),
        not_autocast=("sizes",),
        formula=formulas.size_weighted_attention,
        flops=_two_products,
        bad=() if variant else _BAD_SIZES,
    )


UNEVEN = ((3, 11), (1, 53), (3, 25))
"""35, 55 and 77 tokens are grids of 5 x 7, 5 x 11 and 7 x 11, all of which windows of 2 and 3 have to pad: torch compiles
another graph for a size of 1, for sizes that are equal and for padding of 0."""


def _windows(
    op: str,
    variant: str,
    options: Callable[[Shape], dict],
    keys: Callable[[Shape], tuple[int, int]],
    *,
    table: int = 0,
    lepe: str = "",
    bad: tuple = (),
    even_heads: bool = False,
) -> Case:
    """``table``: rows of the bias table; ``lepe``: "per head", "shared" or none."""

    def sample(shape: Shape, generator):
        heads, drawn = shape.heads, _qkv(_square(shape), generator)
        parameters = {"bias_table": _normal(generator, table, heads)} if table else {}
        if lepe:
            channels = shape.head_dim * (1 if lepe == "shared" else heads)
            parameters["lepe_weight"] = _normal(generator, channels, 1, 3, 3)
            if lepe != "shared":
                parameters["lepe_bias"] = _normal(generator, channels)
        return {**drawn, **parameters}

    parameters = (("bias_table",) if table else ()) + (("lepe_weight",) if lepe else ())
    parameters += ("lepe_bias",) if lepe == "per head" else ()

    def flops(shape: Shape) -> int:
        return _window_flops(shape, shape.heads + shape.heads % 2 if even_heads else shape.heads, keys(shape))

    return Case(
        op=op,
        variant=variant,
        function=getattr(effattn, op),
        sample=sample,
        options=lambda shape: {"grid": _rectangle(shape.tokens), **options(shape)},
        differentiable=("query", "key", "value", *parameters),
        parameters=parameters,
        in_float32=parameters if variant == "" else (),
        formula=getattr(formulas, op),
        flops=flops,
        bad=bad,
        even_heads=even_heads,
        same_kernels=True,  # those of manhattan_attention; tests/test_triton_windows.py has what is particular to windows
        grids=UNEVEN,
    )


def _stripe_keys(width: int) -> Callable[[Shape], tuple[int, int]]:
    def keys(shape: Shape) -> tuple[int, int]:
        height, columns = _rectangle(shape.tokens)
        return (shape.tokens,) * 2 if width >= max(height, columns) else (height * width, columns * width)

    return keys


def _stripes(variant: str, width: int, lepe: str, **options) -> Case:
    return _windows(
        "cross_shaped_window_attention",
        variant,
        lambda shape: {"stripe_width": width, **options},
        _stripe_keys(width),
        lepe=lepe,
        bad=BAD_INPUTS + _BAD_WINDOWS + _BAD_STRIPES if variant == "" else (),
        even_heads=True,
    )


def _without(cases: tuple, *messages: str) -> tuple:
    """Bad arguments but those whose message says one of these."""
    return tuple(case for case in cases if not any(message in case[3] for message in messages))


_BAD_DECAYS = (
    ("log_decay that is no tensor", _set(log_decay=-1.0), TypeError, "log_decay must be a Tensor"),
    ("integer log_decay", _map("log_decay", torch.Tensor.int), TypeError, "log_decay must be floating point"),
    ("log_decay of other heads", _map("log_decay", lambda t: t[1:]), ValueError, "log_decay must have shape"),
    ("log_decay of two dimensions", _map("log_decay", lambda t: t[None]), ValueError, "log_decay must have shape"),
    ("log_decay elsewhere", _map("log_decay", lambda t: t.to("meta")), ValueError, "must be on query's device"),
    ("growing memory", _map("log_decay", torch.neg), ValueError, "log_decay must be at most 0"),
    ("log_decay that is NaN", _map("log_decay", lambda t: t * float("nan")), ValueError, "log_decay must be at most 0"),
)

_BAD_RETENTION = (
    *_without(BAD_INPUTS, "value must have query's shape", "dropout_p"),
    *_BAD_DECAYS,
    ("value of another length", _map("value", lambda t: t[:, :, 1:]), ValueError, "value must have query's shape"),
    ("value without head_dim", _map("value", lambda t: t[..., :0]), ValueError, "value must have query's shape"),
    ("unknown normalize", _set(normalize="softmax"), ValueError, "normalize must be one of .*'softmax'"),
    ("unknown method", _set(method="fft"), ValueError, "method must be one of .*'fft'"),
    ("chunk_size of zero", _set(chunk_size=0), ValueError, "chunk_size must be at least 1"),
    ("fractional chunk_size", _set(chunk_size=2.5), TypeError, "chunk_size must be an int"),
    ("chunk_size without chunks", _set(chunk_size=4, method="parallel"), ValueError, "chunk_size must be None"),
    ("is_causal that is no bool", _set(is_causal=1), TypeError, "is_causal must be a bool"),
    ("state without order", _set(is_causal=False), ValueError, "initial_state goes with is_causal=True"),
    (
        "state asked of no order",
        _set(is_causal=False, initial_state=None, return_state=True),
        ValueError,
        "return_state",
    ),
    (
        "recurrence without order",
        _set(is_causal=False, initial_state=None, method="recurrent"),
        ValueError,
        "method must",
    ),
    ("state of another batch", _map("initial_state", lambda t: t[:1]), ValueError, "initial_state must have shape"),
    ("state without row sum", _set(normalize="retnet"), ValueError, "initial_state must have shape"),
    ("half state", _map("initial_state", torch.Tensor.half), TypeError, "initial_state must be torch.float32"),
    ("state that is no tensor", _set(initial_state=0), TypeError, "initial_state must be a Tensor"),
    ("cu_seqlens that is a list", _set(cu_seqlens=[0, 21]), TypeError, "cu_seqlens must be an int32 Tensor"),
    ("int64 cu_seqlens", _set(cu_seqlens=torch.tensor([0, 21])), TypeError, "cu_seqlens must be an int32 Tensor"),
    (
        "cu_seqlens of a batch",
        _set(cu_seqlens=torch.tensor([0, 21], dtype=torch.int32)),
        ValueError,
        "query must have a batch of 1",
    ),
    (
        "cu_seqlens that end early",
        lambda a: {
            **{n: t[:1] if n in ("query", "key", "value", "initial_state") else t for n, t in a.items()},
            "cu_seqlens": torch.tensor([0, 5], dtype=torch.int32),
        },
        ValueError,
        "cu_seqlens must ascend from 0 to N",
    ),
)

_BAD_MANHATTAN = (
    *BAD_INPUTS,
    *_BAD_DECAYS,
    ("grid of another number of tokens", _set(grid=(4, 6)), ValueError, "grid 4 x 6"),
    ("grid that is no pair", _set(grid=(20,)), TypeError, "grid must be a pair"),
    ("negative num_prefix_tokens", _set(num_prefix_tokens=-1), ValueError, "num_prefix_tokens must be at least 0"),
    ("unknown decay", _set(decay="scores"), ValueError, "decay must be one of .*'scores'"),
    ("decomposed prefix tokens", _set(decomposed=True), ValueError, "num_prefix_tokens must be 0"),
    ("lce_bias without weight", _set(lce_bias=torch.ones(48)), ValueError, "lce_bias must be None"),
    ("lce_weight that is no tensor", _set(lce_weight=1.0), TypeError, "lce_weight must be a Tensor"),
    (
        "lce_weight of other channels",
        _set(lce_weight=torch.ones(47, 1, 5, 5)),
        ValueError,
        "lce_weight must have shape",
    ),
    ("lce_weight of 4 x 4", _set(lce_weight=torch.ones(48, 1, 4, 4)), ValueError, "lce_weight must have shape"),
    ("oblong lce_weight", _set(lce_weight=torch.ones(48, 1, 3, 5)), ValueError, "lce_weight must have shape"),
    (
        "lce_bias of other channels",
        _set(lce_weight=torch.ones(48, 1, 5, 5), lce_bias=torch.ones(47)),
        ValueError,
        "lce_bias must have shape",
    ),
)


def _decays(shape: Shape, generator) -> Tensor:
    """Memories of a fraction of a token up to hundreds of tokens."""
    return -torch.exp2(1 - 8 * torch.rand(shape.heads, generator=generator, dtype=torch.float64))


def _retention(variant: str, *, state: bool = False, scale: float | None = None, **options) -> Case:
    def sample(shape: Shape, generator):
        drawn = {**_qkv(_square(shape), generator), "log_decay": _decays(shape, generator)}
        if state:
            rows = shape.head_dim + (options.get("normalize") == "retnet")
            drawn["initial_state"] = _normal(generator, shape.batch, shape.heads, rows, shape.head_dim)
            if rows > shape.head_dim:
                drawn["initial_state"][:, :, -1] = 1.5
        return drawn

    def flops(shape: Shape) -> int:
        chunk = {"recurrent": 1, "parallel": shape.tokens}.get(options.get("method"), options.get("chunk_size", 64))
        per_token = 4 * min(chunk, shape.tokens) * shape.head_dim + 4 * shape.head_dim**2
        return shape.batch * shape.heads * shape.tokens * per_token

    return Case(
        op="retention",
        variant=variant,
        function=effattn.retention,
        sample=sample,
        options=lambda shape: {**_scaled(scale, shape), **options},
        differentiable=("query", "key", "value", "log_decay", *(("initial_state",) if state else ())),
        parameters=("log_decay",),
        in_float32=("log_decay", "initial_state"),
        formula=formulas.retention,
        flops=flops,
        bad=_BAD_RETENTION if not variant else (),
        takes_dropout=False,
    )


def _manhattan(variant: str, launches: int = 1, lce: bool = False, **options) -> Case:
    def sample(shape: Shape, generator):
        parameters = {}
        if lce:
            channels = shape.heads * shape.head_dim
            parameters = {
                "lce_weight": _normal(generator, channels, 1, 5, 5) / 5,
                "lce_bias": _normal(generator, channels),
            }
        return {**_qkv(_square(shape), generator), "log_decay": _decays(shape, generator), **parameters}

    def grid(shape: Shape) -> dict:
        if options.get("decomposed"):
            return {"grid": _rectangle(shape.tokens)}
        return {"grid": shape.grid, "num_prefix_tokens": shape.prefix}

    def flops(shape: Shape) -> int:
        height, width = grid(shape)["grid"]
        keys = height + width if options.get("decomposed") else shape.tokens
        return shape.batch * shape.heads * shape.tokens * shape.head_dim * (4 * keys + (2 * 25 if lce else 0))

    parameters = ("log_decay", *(("lce_weight", "lce_bias") if lce else ()))
    return Case(
        op="manhattan_attention",
        variant=variant,
        function=effattn.manhattan_attention,
        sample=sample,
        options=lambda shape: {**grid(shape), **options},
        differentiable=("query", "key", "value", *parameters),
        parameters=parameters,
        in_float32=parameters,
        formula=formulas.manhattan_attention,
        flops=flops,
        bad=_BAD_MANHATTAN if not variant else (),
        launches=launches,
        grids=UNEVEN if options.get("decomposed") else ((3, 4), (5, 6), (7, 3)),
    )


_BAD_ENTRIES = (
    ("rpe_bias that is no tensor", _set(rpe_bias=1.0), TypeError, "rpe_bias must be a Tensor"),
    ("integer rpe_bias", _map("rpe_bias", torch.Tensor.int), TypeError, "rpe_bias must be floating point"),
    ("rpe_bias of other heads", _map("rpe_bias", lambda t: t[1:]), ValueError, "rpe_bias must have shape"),
    ("rpe_bias of other tokens", _map("rpe_bias", lambda t: t[..., 2:]), ValueError, "rpe_bias must have shape"),
    ("rpe_bias of a grid", _map("rpe_bias", lambda t: t[:, None]), ValueError, "rpe_bias must have shape"),
    ("rpe_bias elsewhere", _map("rpe_bias", lambda t: t.to("meta")), ValueError, "must be on query's device"),
    ("grid that is no pair", _set(grid=(20,)), TypeError, "grid must be a pair"),
    ("grid of another number of tokens", _set(grid=(4, 6)), ValueError, "grid 4 x 6"),
    ("negative grid", _set(grid=(4, -5)), ValueError, "grid width must be at least 0"),
    ("is_causal that is no bool", _set(is_causal=1), TypeError, "is_causal must be a bool"),
)

_BAD_KERNELIZED = (
    *BAD_TENSORS,
    *_BAD_ENTRIES,
    ("projection that is no tensor", _set(projection=1.0), TypeError, "projection must be a Tensor"),
    ("no projection", _set(projection=None), ValueError, "projection must be given"),
    ("projection of identity", _set(feature_map="identity"), ValueError, "projection must be None"),
    ("projection of other channels", _map("projection", lambda t: t[:, 1:]), ValueError, "projection must have shape"),
    ("projection of other heads", _map("projection", lambda t: t[None]), ValueError, "projection must have shape"),
    ("empty projection", _map("projection", lambda t: t[:0]), ValueError, "projection must have shape"),
    ("projection elsewhere", _map("projection", lambda t: t.to("meta")), ValueError, "must be on query's device"),
    ("unknown feature_map", _set(feature_map="relu"), ValueError, "feature_map must be one of .*'relu'"),
    ("unknown method", _set(method="chunkwise"), ValueError, "method must be one of .*'chunkwise'"),
    ("negative eps", _set(eps=-1.0), ValueError, "eps must be at least 0"),
    ("eps that is NaN", _set(eps=float("nan")), ValueError, "eps must be finite"),
    ("mask that is no tensor", _set(key_padding_mask=[True]), TypeError, "key_padding_mask must be a Tensor"),
    ("mask of floats", _set(key_padding_mask=torch.ones(2, 21)), TypeError, "key_padding_mask must be torch.bool"),
    (
        "mask of other tokens",
        _set(key_padding_mask=torch.ones(2, 20, dtype=torch.bool)),
        ValueError,
        "key_padding_mask must have shape",
    ),
)

_BAD_URPE = (
    *BAD_INPUTS,
    *_BAD_ENTRIES,
    ("coefficient that is no tensor", _set(coefficient=1.0), TypeError, "coefficient must be a Tensor"),
    ("coefficient of other heads", _map("coefficient", lambda t: t[1:]), ValueError, "coefficient must have shape"),
    ("coefficient elsewhere", _map("coefficient", lambda t: t.to("meta")), ValueError, "must be on query's device"),
)


def _entries(shape: Shape, generator, on_grid: bool, heads: int | None = None) -> Tensor:
    """(H, 2N - 1), or of the grid of so many tokens (H, 2h - 1, 2w - 1)."""
    sizes = (2 * s - 1 for s in (_rectangle(shape.tokens) if on_grid else (shape.tokens,)))
    return _normal(generator, shape.heads if heads is None else heads, *(max(size, 0) for size in sizes))


def _kernelized(
    variant: str, *, on_grid: bool = False, padded: bool = False, per_head: bool = False, **options
) -> Case:
    identity = options.get("feature_map") == "identity"

    def sample(shape: Shape, generator):
        drawn = _qkv(_square(shape), generator)
        if identity:
            drawn.update({name: drawn[name].abs() + 0.1 for name in ("query", "key")})
        drawn["rpe_bias"] = _entries(shape, generator, on_grid)
        if not identity:
            heads = (shape.heads,) if per_head else ()
            drawn["projection"] = 0.5 * _normal(generator, *heads, shape.gaussians, shape.head_dim)
        if padded:
            drawn["key_padding_mask"] = _normal(generator, shape.batch, shape.tokens) > 0.5
        return drawn

    def flops(shape: Shape) -> int:
        features = shape.head_dim if identity else shape.gaussians
        features *= 2 if options.get("feature_map") == "trigonometric" else 1
        mapped = 0 if identity else 4 * shape.gaussians * shape.head_dim
        per_token = mapped + 2 * shape.tokens * (features + shape.head_dim)
        return shape.batch * shape.heads * shape.tokens * per_token

    learned = () if identity else ("projection",)
    return Case(
        op="kernelized_rpe_attention",
        variant=variant,
        function=effattn.kernelized_rpe_attention,
        sample=sample,
        options=lambda shape: {**({"grid": _rectangle(shape.tokens)} if on_grid else {}), **options},
        differentiable=("query", "key", "value", "rpe_bias", *learned),
        parameters=("rpe_bias", *learned),
        in_float32=("rpe_bias", *learned),
        formula=formulas.kernelized_rpe_attention,
        flops=flops,
        bad=_BAD_KERNELIZED if not variant else (),
        takes_dropout=False,
        launches=1 if identity else 3,
        grids=UNEVEN if on_grid else ((3, 4), (5, 6), (7, 3)),
    )


def _given_features(variant: str, **options) -> Case:
    own = _kernelized(variant, feature_map="identity", **options)

    def function(query, key, value, rpe_bias, feature_map, **rest):
        return effattn.toeplitz_linear_attention(query, key, value, rpe_bias, **rest)

    bad = () if variant else (*_BAD_ENTRIES, BAD_TENSORS[-1])
    return own.with_(op="toeplitz_linear_attention", function=function, same_kernels=True, bad=bad)


def _urpe(variant: str, *, on_grid: bool = False, bias: bool = True, coefficient: bool = True, **options) -> Case:
    def sample(shape: Shape, generator):
        drawn = _qkv(_square(shape), generator)
        drawn["coefficient"] = _entries(shape, generator, on_grid) if coefficient else None
        if bias:
            drawn["rpe_bias"] = _entries(shape, generator, on_grid)
        return {name: tensor for name, tensor in drawn.items() if tensor is not None}

    tables = (("coefficient",) if coefficient else ()) + (("rpe_bias",) if bias else ())
    absent = {} if coefficient else {"coefficient": None}
    return Case(
        op="urpe_attention",
        variant=variant,
        function=effattn.urpe_attention,
        sample=sample,
        options=lambda shape: {**({"grid": _rectangle(shape.tokens)} if on_grid else {}), **absent, **options},
        differentiable=("query", "key", "value", *tables),
        parameters=tables,
        in_float32=tables,
        formula=formulas.urpe_attention,
        flops=_two_square_products,
        bad=_BAD_URPE if not variant else (),
        grids=UNEVEN if on_grid else ((3, 4), (5, 6), (7, 3)),
    )


CASES: dict[str, tuple[Case, ...]] = {
    "kernelized_rpe_attention": (
        _kernelized(""),
        _kernelized("causal", is_causal=True, padded=True, per_head=True),
        _kernelized("grid", on_grid=True, normalize_qk=False, eps=1e-3),
        _kernelized("trigonometric", feature_map="trigonometric"),
    ),
    "toeplitz_linear_attention": (_given_features("", is_causal=True), _given_features("grid", on_grid=True)),
    "urpe_attention": (
        _urpe(""),
        _urpe("causal", bias=False, is_causal=True),
        _urpe("grid", on_grid=True),
        _urpe("bias alone", coefficient=False, scale=0.3),
    ),
    "retention": (
        _retention("", state=True),
        _retention("bidirectional", is_causal=False, scale=1.3),
        _retention("normalized", state=True, normalize="retnet", method="chunkwise", chunk_size=16),
        _retention("recurrent", state=True, method="recurrent"),
        _retention("parallel", method="parallel", normalize="retnet"),
    ),
    "manhattan_attention": (
        _manhattan(""),
        _manhattan("weights", decay="weights"),
        _manhattan("decomposed", launches=3, lce=True, decomposed=True),
        _manhattan("decomposed weights", launches=2, decomposed=True, decay="weights").with_(same_kernels=True),
    ),
    "cross_shaped_window_attention": (
        _stripes("", 2, "per head", padding="zero_key"),
        _stripes("stripe of one", 1, "shared"),
    ),
    "stripe_attention": (
        _windows(
            "stripe_attention",
            "",
            lambda shape: {"stripe_width": 2, "orientation": "vertical", "padding": "mask", **_scaled(0.8, shape)},
            lambda shape: (_stripe_keys(2)(shape)[0],) * 2,
            lepe="per head",
            bad=(
                *BAD_INPUTS,
                *_BAD_WINDOWS,
                *_BAD_STRIPES,
                ("unknown orientation", _set(orientation="diagonal"), ValueError, "orientation must be one of"),
            ),
        ),
    ),
    "window_attention": (
        _windows(
            "window_attention",
            "",
            lambda shape: {"window": (2, 3), "shift": (1, 1), "padding": "mask"},
            lambda shape: (6, 6),
            table=15,
            lepe="per head",
            bad=BAD_INPUTS + _BAD_WINDOWS + _BAD_SHIFTS,
        ),
        _windows(
            "window_attention",
            "overlap",
            lambda shape: {"window": (3, 2), "overlap": (1, 2), "bias_index": "hat_oca", "padding": "zero_key"},
            lambda shape: (30, 30),
            table=7 * 7,
        ),
    ),
    "gaussian_mixture_attention": (_mixture(""), _mixture("scaled", scale=1.3, eps=0.5)),
    "masked_product_attention": (_masked("shared", per_head=False), _masked("per_head", per_head=True)),
    "scaled_dot_product_attention": (
        _sdpa(""),
        _sdpa("causal", is_causal=True),
        _sdpa("boolean", mask=_boolean_mask),
        _sdpa("additive", mask=_additive_mask, scale=0.7),
        _sdpa("grouped", kv_heads=1, enable_gqa=True),
    ),
    "shift_add_attention": (
        _shift_add("", "per_head", taps=9),
        _shift_add("published", "published", taps=3),
        _shift_add("mean_threshold", "mean_threshold", taps=None),
        _shift_add("sign", "sign", taps=1),
    ),
    "size_weighted_attention": (_token_sizes(""), _token_sizes("column", scale=0.7)),
}

ELSEWHERE = {
    "shift_linear": "test_shift_linear.py",
    "pack_signs": "test_packed_bits.py",
    "add_matmul": "test_packed_bits.py",
    "binary_matmul": "test_packed_bits.py",
    "hamming_attention": "test_packed_bits.py",
    "retention_step": "test_retention.py",
    "bipartite_soft_matching": "test_token_matching.py",
    "TokenMerge.merge": "test_token_merging.py",
    "TokenMerge.merge_weighted": "test_token_merging.py",
    "TokenMerge.unmerge": "test_token_merging.py",
    "soft_merge": "test_soft_merge.py",
}
"""Registered operators that are no attention of query, key and value: the file that holds them to the same rules."""
