"""Linear attention weighted by a Toeplitz matrix: kernelised attention with relative position encoding (NPRF)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, reference
from .._library import Operator
from .._registry import (
    REFERENCE,
    Backend,
    Problem,
    choose,
    cpu_kernel,
    cuda_kernel,
    register,
    triton_kernel,
)
from . import toeplitz_methods as methods
from .toeplitz_checks import check_causal, check_entries, check_eps, check_padding_mask, grid_or_line, relative_entries

FEATURE_MAPS = ("positive", "trigonometric", "identity")
SHIFTS = ("none", "row", "head")
GPU_CROSSOVER = 12288, 24576  # tokens from which the FFT costs less than tiles, at equal utilisation: not measured
SHORT = 32  # tokens up to which tiles cost least whatever the machine


def _feature_flops(x, projection, mask, *options) -> int:
    batch, heads, length, head_dim = x
    return 2 * batch * heads * length * head_dim * projection[1]


def _fake_features(x, projection, mask, trigonometric, normalize, shift):
    return x.new_empty((*x.shape[:3], projection.shape[1] * (2 if trigonometric else 1)))


features = Operator(
    "feature_map",
    family="feature_map",
    tensors=("x", "projection", "?mask"),
    differentiable=("x", "projection"),
    parameters=("projection",),
    options="bool trigonometric, bool normalize, int shift",
    saved={},
    fake=_fake_features,
    flops=_feature_flops,
    axes={"mask": "batch"},
)
"""phi(x), (B, H, N, M) contiguous, trigonometric (B, H, N, 2 M): sines, then cosines.

projection: (H, M, D) contiguous float32; mask: (B, N) bool, True: a row of zeros; shift: an index of SHIFTS, which gets no
gradient (reference/toeplitz.py).
"""


def _flops(query, key, value, *options) -> int:
    """Both products of the direct method, whatever runs; a multiply-add is two."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * length * (width + value[3])


def _fake(query, key, value, *args):
    return torch.empty_like(value), query.new_empty(query.shape[:3], dtype=torch.float32)


toeplitz = Operator(
    "toeplitz",
    family="toeplitz",
    tensors=("query", "key", "value", "bias", "?plan"),
    differentiable=("query", "key", "value", "bias"),
    parameters=("bias", "plan"),
    linear=("value",),
    options="SymInt grid_h, SymInt grid_w, bool is_causal, int method, float eps, bool needs_bias_gradient",
    saved={"normalizer": lambda *shape: shape[:3]},
    fake=_fake,
    flops=_flops,
    axes={"plan": ""},
)
"""W_ij = (query_i . key_j) exp(b_{j-i} - max b), normalizer_i = sum_j W_ij + eps, O_i = sum_j W_ij v_j / normalizer_i.

query, key: features (B, H, N, M); value: (B, H, N, D). bias: (H, (2 h - 1)(2 w - 1)) contiguous float32; token i stands at
p_i = (i // w)(2 w - 1) + i % w, and b_{j-i} is entry p_j - p_i + (h - 1)(2 w - 1) + w - 1. A sequence is a grid (1, N).
plan: what ``toeplitz_methods.plan`` says, for method BY_PLAN. A row whose normalizer is 0 gives 0. Without
``needs_bias_gradient`` the bias gets a gradient of zeros: its entries beyond any distance are sums over whole diagonals,
which a method that is linear in N does not have.
"""


def _cuda(problem: Problem) -> tuple[bool, str]:
    if problem.method not in ("auto", "fft"):
        return False, f"CUDA has method 'fft', and this call asks for {problem.method!r}"
    return cuda_kernel(problem)


def _wants_fft(problem: Problem) -> tuple[bool, str]:
    if problem.method != "fft":
        return False, "method 'fft', which this call does not want: the direct one is faster or the bias too wide"
    return cuda_kernel(problem)


def _triton(problem: Problem) -> tuple[bool, str]:
    if problem.method not in ("auto", "direct"):
        return False, f"Triton has method 'direct', and this call asks for {problem.method!r}"
    return triton_kernel(problem)


for _name in ("kernelized_rpe_attention", "toeplitz_linear_attention"):
    register(
        _name, (Backend("cpu", cpu_kernel), Backend("cuda", _cuda, _wants_fft), Backend("triton", _triton), REFERENCE)
    )


def kernelized_rpe_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpe_bias: Tensor,
    projection: Tensor | None = None,
    *,
    feature_map: str = "positive",
    normalize_qk: bool = True,
    grid: tuple[int, int] | None = None,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    method: str = "auto",
    eps: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    r"""Kernelised (random feature) attention with a relative position bias, exact and without an N x N matrix: NPRF.

    .. math::
        O_i = \frac{\sum_j c_{j-i}\, (\phi(q_i) \cdot \phi(k_j))\, v_j}
                   {\sum_j c_{j-i}\, \phi(q_i) \cdot \phi(k_j) + \text{eps}}, \qquad c = e^{b - \max b}

    with b = ``rpe_bias`` and queries and keys divided by their length first (``normalize_qk``); there is no 1 / sqrt(D).

    Args:
        query, key, value: (B, H, N, D), float32, bfloat16, float16 or float64 (float64: reference only), any strides.
        rpe_bias: (H, 2N - 1), entry (j - i) + N - 1 for query i and key j; with ``grid`` (H, 2h - 1, 2w - 1), entry
            (dy + h - 1, dx + w - 1) of key minus query. H may be 1: shared. -inf is a weight of 0.
        projection: (M, D) or (H, M, D), the directions w_m, as :func:`random_features` draws them; None for "identity".
        feature_map: "positive": exp(w.x - |x|^2 / 2) / sqrt(M), M features; "trigonometric": exp(|x|^2 / 2) [sin(w.x),
            cos(w.x)] / sqrt(M), 2 M features, whose weights may be negative; "identity": query and key are the features
            already, as some positive map gave them (``normalize_qk`` then has nothing to do).
        normalize_qk: False: queries and keys as they are. Exponents are shifted by their maximum, which cancels, unless
            ``eps`` is above 0.
        grid: (h, w), rows and columns of the token grid; None: a sequence.
        is_causal: token i sees tokens 0..i only.
        key_padding_mask: (B, N) bool, True where a key takes no part.
        method: "direct" (tiles, quadratic in N), "fft" (N log N), "structured" (linear in N; for a bias that is linear or
            constant beyond some distance; a gradient of the bias itself takes the direct method's backward), or "auto":
            the fastest whose error stays within the rounding of the dtype.
            All are exact; the FFT's error grows with the range of the bias, so "auto" looks at it, except on a GPU
            under torch.compile or graph capture. A method that cannot serve the bias raises.
        eps: added to the denominator; a row whose denominator is 0 gives 0.
        backend: "auto", "cuda", "triton", "cpu" or "reference"; an explicit backend never falls back.

    Returns:
        Tensor: (B, H, N, D), query's dtype. Differentiable in query, key, value, rpe_bias and projection.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        NotImplementedError: the explicit ``backend`` cannot serve this call; the message says why.

    Source:
        Stable, Fast and Accurate: Kernelized Attention with Relative Positional Encoding, arXiv 2106.12566, section 3.

    Example:
        >>> import torch, effattn
        >>> query, key, value = torch.randn(3, 1, 2, 50, 16)
        >>> projection = effattn.random_features(32, 16)
        >>> bias = torch.randn(2, 99)
        >>> effattn.kernelized_rpe_attention(query, key, value, bias, projection).shape
        torch.Size([1, 2, 50, 16])
    """
    op = "kernelized_rpe_attention"
    _checks.attention_inputs(op, query, key, value)
    _checks.one_of(op, "feature_map", feature_map, FEATURE_MAPS)
    _check_projection(op, projection, query, feature_map)
    _checks.boolean(op, "normalize_qk", normalize_qk)
    size, eps = _check_common(op, query, rpe_bias, grid, is_causal, key_padding_mask, method, eps)
    query, key, value = _checks.autocast(query, key, value)
    identity = feature_map == "identity"
    count = query.shape[3] if identity else projection.shape[-2] * (2 if feature_map == "trigonometric" else 1)
    entries = relative_entries(rpe_bias, query.shape[1], eps, is_causal)
    features_like = query if identity else query[..., :1].expand(*query.shape[:3], count)
    backend, method = _choose(op, backend, features_like, value, entries, size, is_causal, method)
    if backend == "reference":
        return reference.kernelized_rpe_attention(
            *(
                query,
                key,
                value,
                rpe_bias,
                projection,
                feature_map,
                normalize_qk,
                grid,
                is_causal,
                key_padding_mask,
                eps,
            )
        )
    if identity:
        query_features, key_features = query, _masked(key, key_padding_mask)
    else:
        directions = projection.float().expand(query.shape[1], *projection.shape[-2:]).contiguous()
        mask = None if key_padding_mask is None else key_padding_mask.contiguous()
        shifts = (SHIFTS.index("row"), SHIFTS.index("head")) if eps == 0 else (0, 0)
        options = (feature_map == "trigonometric", normalize_qk)
        query_features = features(backend, query, directions, None, *options, shifts[0])
        key_features = features(backend, key, directions, mask, *options, shifts[1])
    return _attend(op, backend, query_features, key_features, value, entries, size, is_causal, method, eps)


def toeplitz_linear_attention(
    query_features: Tensor,
    key_features: Tensor,
    value: Tensor,
    rpe_bias: Tensor,
    *,
    grid: tuple[int, int] | None = None,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    method: str = "auto",
    eps: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    r"""Linear attention whose weights are multiplied with a Toeplitz matrix, of features that the caller computed.

    .. math::
        O_i = \frac{\sum_j c_{j-i}\, (\phi_{q,i} \cdot \phi_{k,j})\, v_j}
                   {\sum_j c_{j-i}\, \phi_{q,i} \cdot \phi_{k,j} + \text{eps}}, \qquad c = e^{b - \max b}

    Args:
        query_features, key_features: (B, H, N, M), float32, bfloat16, float16 or float64 (float64: reference only), any
            strides; positive, unless the denominators are known to stay away from 0.
        value: (B, H, N, D); D may differ from M.
        rpe_bias: (H, 2N - 1), or with ``grid`` (H, 2h - 1, 2w - 1); H may be 1.
        grid, is_causal, key_padding_mask, method, eps, backend: as :func:`kernelized_rpe_attention`.

    Returns:
        Tensor: (B, H, N, D), value's dtype. Differentiable in query_features, key_features, value and rpe_bias.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        NotImplementedError: the explicit ``backend`` cannot serve this call; the message says why.

    Source:
        arXiv 2106.12566, section 3.2.

    Example:
        >>> import torch, effattn
        >>> query, key = torch.rand(2, 1, 2, 50, 8)
        >>> value = torch.randn(1, 2, 50, 16)
        >>> constant = torch.zeros(1, 99)
        >>> out = effattn.toeplitz_linear_attention(query, key, value, constant)
        >>> linear = query @ (key.mT @ value) / (query @ key.sum(2, keepdim=True).mT)
        >>> torch.allclose(out, linear, atol=1e-5)
        True
    """
    op = "toeplitz_linear_attention"
    _check_features(op, query_features, key_features, value)
    size, eps = _check_common(op, query_features, rpe_bias, grid, is_causal, key_padding_mask, method, eps)
    query, key, value = _checks.autocast(query_features, key_features, value)
    entries = relative_entries(rpe_bias, query.shape[1], eps, is_causal)
    backend, method = _choose(op, backend, query, value, entries, size, is_causal, method)
    if backend == "reference":
        return reference.toeplitz_linear_attention(query, key, value, rpe_bias, grid, is_causal, key_padding_mask, eps)
    key = _masked(key, key_padding_mask)
    return _attend(op, backend, query, key, value, entries, size, is_causal, method, eps)


def random_features(
    num_features: int, head_dim: int, *, orthogonal: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """Directions w_m of random features: Gaussian, and orthogonal in blocks of ``head_dim``.

    Args:
        num_features: M.
        head_dim: D.
        orthogonal: rows of a block of D are orthogonal, which lowers the variance of the estimate; their lengths are
            those of independent Gaussian vectors, so each row by itself is Gaussian. False: independent rows.
        generator: to draw with; default: torch's own on the CPU.

    Returns:
        Tensor: (M, D), float32, on the CPU or the generator's device. Draw again to redraw.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.

    Source:
        Rethinking Attention with Performers, arXiv 2009.14794, section 2.4.

    Example:
        >>> import torch, effattn
        >>> w = effattn.random_features(4, 16, generator=torch.Generator().manual_seed(0))
        >>> gram = w @ w.mT
        >>> torch.allclose(gram, gram.diag().diag(), atol=1e-4)
        True
    """
    op = "random_features"
    _checks.integer(op, "num_features", num_features, 1)
    _checks.integer(op, "head_dim", head_dim, 1)
    _checks.boolean(op, "orthogonal", orthogonal)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{op}: generator must be a torch.Generator or None, got {type(generator).__name__}")
    device = "cpu" if generator is None else generator.device
    draw = {"generator": generator, "device": device, "dtype": torch.float64}
    gaussian = torch.randn(num_features, head_dim, **draw)
    if not orthogonal:
        return gaussian.float()
    blocks = -(-num_features // head_dim)
    square, triangle = torch.linalg.qr(torch.randn(blocks, head_dim, head_dim, **draw))
    square = square * triangle.diagonal(dim1=-2, dim2=-1).sign()[:, None]  # uniform over the rotations
    directions = square.mT.flatten(0, 1)[:num_features]
    return (directions * gaussian.norm(dim=-1, keepdim=True)).float()


# ---- shared by both operators ----


def _check_common(op, query, rpe_bias, grid, is_causal, key_padding_mask, method, eps) -> tuple[tuple[int, int], float]:
    size = grid_or_line(op, grid, query.shape[2])
    check_entries(op, "rpe_bias", rpe_bias, query, size, grid)
    check_causal(op, is_causal)
    check_padding_mask(op, key_padding_mask, query)
    _checks.one_of(op, "method", method, methods.METHODS)
    return size, check_eps(op, eps)


def _check_projection(op: str, projection: Tensor | None, query: Tensor, feature_map: str) -> None:
    if feature_map == "identity":
        if projection is not None:
            raise ValueError(f"{op}: projection must be None where feature_map is 'identity'")
        return
    if projection is None:
        raise ValueError(f"{op}: projection must be given for feature_map {feature_map!r}: random_features(M, D)")
    _checks.parameter(op, "projection", projection, query)
    shape, heads, head_dim = tuple(projection.shape), query.shape[1], query.shape[3]
    if len(shape) not in (2, 3) or shape[-1] != head_dim or shape[-2] < 1 or (len(shape) == 3 and shape[0] != heads):
        raise ValueError(
            f"{op}: projection must have shape (M, D) or (H, M, D) with D = {head_dim} and H = {heads}, got {shape}"
        )


def _check_features(op: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    if _checks.are_alike(query, key, value):
        return
    given = (("query_features", query), ("key_features", key), ("value", value))
    for name, tensor in given:
        _checks.floating(op, name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{op}: {name} must have shape (batch, heads, tokens, size), got {tuple(tensor.shape)}")
    for name, tensor in given[1:]:
        if tensor.dtype != query.dtype:
            raise TypeError(f"{op}: {name} must have query_features' dtype {query.dtype}, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{op}: {name} must be on query_features' device {query.device}, got {tensor.device}")
    if key.shape != query.shape or query.shape[3] < 1:
        raise ValueError(
            f"{op}: key_features must have query_features' shape {tuple(query.shape)} with a size of at least 1, got "
            f"{tuple(key.shape)}"
        )
    if value.shape[:3] != query.shape[:3] or value.shape[3] < 1:
        raise ValueError(
            f"{op}: value must have shape {tuple(query.shape[:3])} and a size of at least 1, got {tuple(value.shape)}"
        )


def _masked(key: Tensor, mask: Tensor | None) -> Tensor:
    return key if mask is None else key.masked_fill(mask[:, None, :, None], 0.0)


def _choose(op, backend, query, value, entries, size, is_causal, method) -> tuple[str, str]:
    """The backend, and the method that is asked of it."""
    device = query.device.type
    width = max(query.shape[3], value.shape[3])
    asked = method
    if method == "auto" and backend in ("auto", "cuda") and device == "cuda":
        asked = _method_on_gpu(query, value, entries, size, is_causal, backend)
    problem = Problem(device, query.dtype, width, method=asked)

    def notes(chosen: str) -> list[str]:
        if chosen != "cpu":
            return []
        kernel, report = methods.planned(entries, query, value, size, is_causal, method)
        if not kernel.item():
            methods.refuse(op, method, report)
        return methods.notes(method, kernel.item(), report)

    return choose(op, backend, problem, notes), asked


def _method_on_gpu(query, value, entries, size, is_causal, backend: str) -> str:
    """ "fft" where it is faster and accurate. Looking at the bias waits for the device, so only where N is large."""
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return "auto"
    if backend == "auto" and query.shape[2] < GPU_CROSSOVER[is_causal]:
        return "direct"
    kernel, _ = methods.planned(entries, query, value, size, is_causal, "fft")
    return "fft" if kernel.item() else "direct"


def _attend(op, backend, query, key, value, entries, size, is_causal, method, eps) -> Tensor:
    plan, kernel = _kernel_method(op, backend, query, value, entries, size, is_causal, method)
    needs_bias_gradient = torch.is_grad_enabled() and entries.requires_grad
    return toeplitz(
        backend, query, key, value, entries, plan, *size, is_causal, kernel, float(eps), needs_bias_gradient
    )


def _is_short(query: Tensor) -> bool:
    """Whether no plan could say anything but "direct", and making one costs more than the attention."""
    return not torch.compiler.is_compiling() and query.shape[2] <= SHORT


def _kernel_method(op, backend, query, value, entries, size, is_causal, method) -> tuple[Tensor | None, int]:
    """What the kernels are told: a plan that they look at, or the code of a method."""
    if backend == "triton" or method == "direct" or (method == "auto" and backend == "cpu" and _is_short(query)):
        return None, methods.DIRECT
    asked = "fft" if backend == "cuda" else method
    plan, report = methods.planned(entries, query, value, size, is_causal, asked)
    chosen = None if asked == "auto" else methods.known(plan)
    if chosen == 0:
        methods.refuse(op, asked, report)
    if backend == "cpu":
        return plan, methods.BY_PLAN
    # CUDA kernels look at no plan. In float32 they transform in float64 whether the plan is known here or not.
    return None, chosen if chosen and value.dtype != torch.float32 else methods.DOUBLE_FFT
