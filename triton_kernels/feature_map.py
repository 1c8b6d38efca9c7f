"""Random features of queries and keys.

    x <- x / |x| with normalize    product_m = w_m . x    half = |x|^2 / 2
    positive        phi_m = exp(product_m - half - s) / sqrt(M)
    trigonometric   phi = exp(half - s) [sin(product), cos(product)] / sqrt(M)
    s: 0, the largest exponent of the row, or of the head among the rows that the mask keeps; it gets no gradient
    G_m = the gradient of product_m: g_m phi_m, or g_m phi_{M+m} - g_{M+m} phi_m    t = sum_m g_m phi_m
    dx = G W -/+ t x;  with normalize, of dx the part across x, divided by |x|      dw_m = sum over rows of G_m x

x is (B, H, N, D), directions w are (H, M, D) in float32. A kernel of its own instead of features made inside the attention: that
would save writing M and reading M instead of D elements a key, which M < D does not even want, and would recompute phi(k) in every
tile of queries.

Kernel                one program owns                     in registers              streamed through shared memory   FLOPs per (b, h)
head_maxima           BLOCK_N rows of a (b, h)             products of BLOCK_N x M   BLOCK_K columns of x and w       2 N M D
map_features          BLOCK_N rows of a (b, h)             products of BLOCK_N x M   BLOCK_K columns of x and w       2 N M D
feature_gradient      BLOCK_N rows of a (b, h)             dx, the row of x          BLOCK_F of g, phi and w          2 N M D
direction_gradient    BLOCK_F x BLOCK_K of dw, a chunk     their sums                BLOCK_N rows of g, phi and x     2 N M D

Products are those of float32 at any dtype: 16-bit rows are exact, and w is split into two numbers of the dtype. The backward takes
phi as it was stored, which has exponential, shift and mask in it. Bytes at e per element: features N (D + F) e, with F the number of
features, and N D e more for a maximum of heads; gradients N (2 F + 2 D) e and N (2 F + D) e per BLOCK_K columns. dw is added up in
two ordered stages: over the rows of a chunk, then over the chunks.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import configurations as table
from .cross_shaped_window_gradients import sum_partials
from .tiles import _locate, _rows, _store_rows, matmul, narrow
from .toeplitz_kernels import weigh

NONE, ROW, HEAD = range(3)  # of shift


class Configuration(NamedTuple):
    block_n: int
    block_f: int
    block_k: int
    num_warps: int
    num_stages: int


C = Configuration
REDUCE = C(32, 0, 64, 4, 1)


# ---- parts ----


@triton.jit
def products(
    x,
    strides,
    projection,
    i,
    valid,
    HEAD_DIM: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(x W^T, |x|^2) of rows x and the directions of their head."""
    f = tl.arange(0, BLOCK_F)
    product = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    squared = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, HEAD_DIM, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        rows = x + i.to(tl.int64)[:, None] * strides[2] + d.to(tl.int64)[None, :] * strides[3]
        part = tl.load(rows, mask=valid[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        inside = (f < FEATURES)[:, None] & (d < HEAD_DIM)[None, :]
        w = tl.load(projection + f[:, None] * HEAD_DIM + d[None, :], mask=inside, other=0.0)
        if part.dtype == tl.float32:
            product = matmul(part, tl.trans(w), product, PRECISION)
        else:
            high = narrow(w, part.dtype)
            product = matmul(part, tl.trans(high), product, PRECISION)
            product = matmul(part, tl.trans(narrow(w - high.to(tl.float32), part.dtype)), product, PRECISION)
        wide = part.to(tl.float32)
        squared += tl.sum(wide * wide, 1)
    return product, squared


@triton.jit
def inverse_length(squared):
    """1 / |x|; 0 of a row of zeros."""
    return tl.where(squared == 0.0, 0.0, 1.0 / tl.sqrt(tl.where(squared == 0.0, 1.0, squared)))


@triton.jit
def exponents(
    product,
    squared,
    i,
    valid,
    mask,
    FEATURES: tl.constexpr,
    BLOCK_F: tl.constexpr,
    TRIGONOMETRIC: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """(products, exponents: of each feature, or trigonometric of each row); -inf of a masked row and past the features."""
    half = squared * 0.5
    if NORMALIZE:
        product = product * inverse_length(squared)[:, None]
        half = tl.where(squared == 0.0, 0.0, 0.5)
    keep = valid
    if mask is not None:
        keep = keep & (tl.load(mask + i, mask=valid, other=1) == 0)
    if TRIGONOMETRIC:
        return product, tl.where(keep, half, float("-inf"))
    else:
        exists = keep[:, None] & (tl.arange(0, BLOCK_F) < FEATURES)[None, :]
        return product, tl.where(exists, product - half[:, None], float("-inf"))


@triton.jit
def sine_and_cosine(x):
    """To float32's last bits; the reduction's error stays below the rounding of x itself. No slow path, which would spill."""
    n = tl.floor(x * 0.63661977236758134 + 0.5)
    r = ((x - n * 1.5703125) - n * 4.837512969970703e-4) - n * 7.5497899548918822e-8  # pi / 2, the first parts short
    z = r * r
    sine = r + r * z * (-0.16666654 + z * (0.00833215 + z * -0.00019514))
    cosine = 1.0 - 0.5 * z + z * z * (0.0416666466 + z * (-0.00138873554 + z * 2.44370078e-05))
    quadrant = n - 4.0 * tl.floor(n * 0.25)
    odd = (quadrant == 1.0) | (quadrant == 3.0)
    first = tl.where(odd, cosine, sine)
    second = tl.where(odd, sine, cosine)
    return (
        tl.where(quadrant >= 2.0, -first, first),
        tl.where((quadrant == 1.0) | (quadrant == 2.0), -second, second),
    )


@triton.jit
def feature_pointers(pointer, strides, i, f):
    return pointer + i.to(tl.int64) * strides[2] + f.to(tl.int64) * strides[3]


@triton.jit
def product_gradient(
    grad, features, grad_strides, strides, i, f, exists, FEATURES: tl.constexpr, TRIGONOMETRIC: tl.constexpr
):
    """(G, g phi summed over what belongs to a direction) at i x f, which broadcast."""
    g = tl.load(feature_pointers(grad, grad_strides, i, f), mask=exists, other=0.0).to(tl.float32)
    phi = tl.load(feature_pointers(features, strides, i, f), mask=exists, other=0.0).to(tl.float32)
    if TRIGONOMETRIC:
        g_cosine = tl.load(feature_pointers(grad, grad_strides, i, f + FEATURES), mask=exists, other=0.0).to(tl.float32)
        cosine = tl.load(feature_pointers(features, strides, i, f + FEATURES), mask=exists, other=0.0).to(tl.float32)
        return g * cosine - g_cosine * phi, g * phi + g_cosine * cosine
    else:
        return g * phi, g * phi


# ---- forward ----


@triton.jit(do_not_specialize=["num_heads", "num_tokens"])
def head_maxima(
    x,
    projection,
    mask,
    maxima,
    strides,
    num_heads,
    num_tokens,
    TRIGONOMETRIC: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """maxima (B, H, blocks): the largest exponent of a block of rows."""
    blocks = tl.cdiv(num_tokens, BLOCK_N)
    program = tl.program_id(0)
    b = (program // blocks // num_heads).to(tl.int64)
    h = (program // blocks % num_heads).to(tl.int64)
    i = program % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = i < num_tokens
    if mask is not None:
        mask += b * num_tokens
    product, squared = products(
        *(_locate(x, strides, b, h), strides, projection + h * FEATURES * HEAD_DIM, i, valid),
        *(HEAD_DIM, FEATURES, BLOCK_N, BLOCK_F, BLOCK_K, PRECISION),
    )
    _, exponent = exponents(product, squared, i, valid, mask, FEATURES, BLOCK_F, TRIGONOMETRIC, NORMALIZE)
    if not TRIGONOMETRIC:
        exponent = tl.max(exponent, 1)
    tl.store(maxima + program, tl.max(exponent, 0))


@triton.jit(do_not_specialize=["num_heads", "num_tokens"])
def map_features(
    x,
    projection,
    mask,
    highest,
    features,
    strides,
    num_heads,
    num_tokens,
    factor,
    SHIFT: tl.constexpr,
    TRIGONOMETRIC: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """features (B, H, N, M or 2 M) contiguous; highest (B, H): the largest exponent of a head, where that is the shift."""
    blocks = tl.cdiv(num_tokens, BLOCK_N)
    program = tl.program_id(0)
    b = (program // blocks // num_heads).to(tl.int64)
    h = (program // blocks % num_heads).to(tl.int64)
    i = program % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = i < num_tokens
    if mask is not None:
        mask += b * num_tokens
    product, squared = products(
        *(_locate(x, strides, b, h), strides, projection + h * FEATURES * HEAD_DIM, i, valid),
        *(HEAD_DIM, FEATURES, BLOCK_N, BLOCK_F, BLOCK_K, PRECISION),
    )
    product, exponent = exponents(product, squared, i, valid, mask, FEATURES, BLOCK_F, TRIGONOMETRIC, NORMALIZE)
    if SHIFT == 2:
        most = tl.load(highest + b * num_heads + h)
        exponent -= tl.where(most == float("-inf"), 0.0, most)
    elif SHIFT == 1:
        most = exponent if TRIGONOMETRIC else tl.max(exponent, 1)
        most = tl.where(most == float("-inf"), 0.0, most)
        exponent -= most if TRIGONOMETRIC else most[:, None]
    f = tl.arange(0, BLOCK_F)
    exists = valid[:, None] & (f < FEATURES)[None, :]
    row = (b * num_heads + h) * num_tokens + i
    dtype = features.dtype.element_ty
    if TRIGONOMETRIC:
        amplitude = (tl.exp(exponent) * factor)[:, None]
        sine, cosine = sine_and_cosine(product)
        pointers = features + row[:, None] * (2 * FEATURES) + f[None, :]
        tl.store(pointers, narrow(tl.where(amplitude == 0.0, 0.0, amplitude * sine), dtype), mask=exists)
        tl.store(pointers + FEATURES, narrow(tl.where(amplitude == 0.0, 0.0, amplitude * cosine), dtype), mask=exists)
    else:
        pointers = features + row[:, None] * FEATURES + f[None, :]
        tl.store(pointers, narrow(tl.exp(exponent) * factor, dtype), mask=exists)


# ---- backward ----


@triton.jit(do_not_specialize=["num_heads", "num_tokens"])
def feature_gradient(
    grad,
    x,
    projection,
    features,
    grad_x,
    scale,
    strides,
    num_heads,
    num_tokens,
    TRIGONOMETRIC: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_x, and with NORMALIZE scale (B, H, N) = 1 / |x|."""
    blocks = tl.cdiv(num_tokens, BLOCK_N)
    program = tl.program_id(0)
    b = (program // blocks // num_heads).to(tl.int64)
    h = (program // blocks % num_heads).to(tl.int64)
    i = program % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = i < num_tokens
    dims = tl.arange(0, BLOCK_D)
    grad = _locate(grad, strides[0], b, h)
    features = _locate(features, strides[1], b, h)
    projection += h * FEATURES * HEAD_DIM
    dx = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, FEATURES, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        exists = valid[:, None] & (f < FEATURES)[None, :]
        g, radial = product_gradient(
            *(grad, features, strides[0], strides[1], i[:, None], f[None, :], exists, FEATURES, TRIGONOMETRIC)
        )
        total += tl.sum(radial, 1)
        inside = (f < FEATURES)[:, None] & (dims < HEAD_DIM)[None, :]
        w = tl.load(projection + f[:, None] * HEAD_DIM + dims[None, :], mask=inside, other=0.0)
        dx = weigh(g, narrow(w, x.dtype.element_ty), dx, PRECISION)
    row = _rows(_locate(x, strides[2], b, h), strides[2], i, valid, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    if NORMALIZE:
        inverse = inverse_length(tl.sum(row * row, 1))
        row = row * inverse[:, None]
        dx = (dx - row * tl.sum(dx * row, 1)[:, None]) * inverse[:, None]
        tl.store(scale + (b * num_heads + h) * num_tokens + i, inverse, mask=valid)
    elif TRIGONOMETRIC:
        dx += total[:, None] * row
    else:
        dx -= total[:, None] * row
    _store_rows(_locate(grad_x, strides[3], b, h), strides[3], dx, i, valid, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["batch", "num_heads", "num_tokens", "share"])
def direction_gradient(
    grad,
    x,
    features,
    scale,
    partial,
    strides,
    batch,
    num_heads,
    num_tokens,
    share,
    TRIGONOMETRIC: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """partial (chunks, H, M, D): a tile of dw over a chunk of `share` blocks of rows, of all batches."""
    tiles_d: tl.constexpr = (HEAD_DIM + BLOCK_K - 1) // BLOCK_K
    tiles: tl.constexpr = (FEATURES + BLOCK_F - 1) // BLOCK_F * tiles_d
    program = tl.program_id(0)
    f = program % tiles // tiles_d * BLOCK_F + tl.arange(0, BLOCK_F)
    d = program % tiles_d * BLOCK_K + tl.arange(0, BLOCK_K)
    h = (program // tiles % num_heads).to(tl.int64)
    chunk = program // tiles // num_heads
    blocks = tl.cdiv(num_tokens, BLOCK_N)
    total = tl.zeros((BLOCK_F, BLOCK_K), tl.float32)
    for member in range(chunk * share, tl.minimum(chunk * share + share, batch * blocks)):
        b = (member // blocks).to(tl.int64)
        i = member % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = i < num_tokens
        exists = (f < FEATURES)[:, None] & valid[None, :]
        grad_head = _locate(grad, strides[0], b, h)
        features_head = _locate(features, strides[1], b, h)
        g, _ = product_gradient(
            *(grad_head, features_head, strides[0], strides[1]),
            *(i[None, :], f[:, None], exists, FEATURES, TRIGONOMETRIC),
        )
        if NORMALIZE:
            g = g * tl.load(scale + (b * num_heads + h) * num_tokens + i, mask=valid, other=0.0)[None, :]
        rows = feature_pointers(_locate(x, strides[2], b, h), strides[2], i[:, None], d[None, :])
        part = tl.load(rows, mask=valid[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        total = weigh(g, part, total, PRECISION)
    destination = partial + ((chunk * num_heads + h) * FEATURES + f[:, None]) * HEAD_DIM + d[None, :]
    tl.store(destination, total, mask=(f < FEATURES)[:, None] & (d < HEAD_DIM)[None, :])


# ---- launchers ----

TARGET_PROGRAMS = 1024  # as in gaussian_mixture.py


def _is_single(x) -> bool:
    return x.dtype == torch.float32


def _forward_configuration(x, directions):
    """Chosen by ahead-of-time compiles, as in configurations.py."""
    features, block_d = table.block_d(directions), table.block_d(x.shape[3])
    if table.architecture(x.device) == "interpreted":
        return C(64, features, min(block_d, 32), 4, 1)
    if _is_single(x):
        return C(32 if features <= 128 else 16, features, 16, 8 if features == 128 else 4, 1)
    return C(64, features, min(block_d, 64 if features <= 64 else 32), 4 if features <= 64 else 8, 2)


def _gradient_configuration(x, directions):
    features, block_d = table.block_d(directions), table.block_d(x.shape[3])
    if table.architecture(x.device) == "interpreted":
        return C(64, min(features, 32), block_d, 4, 1)
    if _is_single(x):
        return C(32 if block_d <= 64 else 16, min(features, 16), block_d, 4, 1)
    return C(64 if block_d <= 128 else 32, min(features, 32), block_d, 4 if block_d <= 64 else 8, 2)


def _direction_configuration(x, directions):
    features, block_d = table.block_d(directions), table.block_d(x.shape[3])
    if table.architecture(x.device) == "interpreted":
        return C(32, min(features, 64), min(block_d, 64), 4, 1)
    if _is_single(x):
        return C(16, min(features, 32), min(block_d, 32), 4, 1)
    return C(64, min(features, 64), min(block_d, 64), 4, 2)


def _options(x, projection, trigonometric, normalize) -> dict:
    return {
        "TRIGONOMETRIC": trigonometric,
        "NORMALIZE": normalize,
        "HEAD_DIM": x.shape[3],
        "FEATURES": projection.shape[1],
    }


def feature_map_fwd(x, projection, mask, trigonometric, normalize, shift):
    batch, heads, tokens, _ = x.shape
    directions = projection.shape[1]
    features = x.new_empty((batch, heads, tokens, directions * (2 if trigonometric else 1)))
    if features.numel() == 0:
        return features
    config = _forward_configuration(x, directions)
    blocks = triton.cdiv(tokens, config.block_n)
    options = _options(x, projection, trigonometric, normalize) | {
        "BLOCK_N": config.block_n,
        "BLOCK_F": config.block_f,
        "BLOCK_K": config.block_k,
        "PRECISION": table.precision(x),
    }
    programs, sizes = batch * heads * blocks, (x.stride(), heads, tokens)
    mask = None if mask is None else mask.view(torch.uint8)
    highest = None
    if shift == HEAD:
        maxima = torch.empty((batch, heads, blocks), dtype=torch.float32, device=x.device)
        table.launch(head_maxima, programs, x.device, config, x, projection, mask, maxima, *sizes, **options)
        highest = maxima.amax(2)
    arguments = (x, projection, mask, highest, features, *sizes, directions**-0.5)
    table.launch(map_features, programs, x.device, config, *arguments, SHIFT=shift, **options)
    return features


def feature_map_bwd(grad_output, x, projection, mask, output, trigonometric, normalize, shift):
    """(grad_x, grad_projection)"""
    batch, heads, tokens, head_dim = x.shape
    directions = projection.shape[1]
    grad_x = torch.empty_like(x)
    if x.numel() == 0:
        return grad_x, torch.zeros_like(projection)
    options = _options(x, projection, trigonometric, normalize) | {"PRECISION": _precision(x)}
    scale = torch.empty((batch, heads, tokens), dtype=torch.float32, device=x.device) if normalize else None
    strides = (grad_output.stride(), output.stride(), x.stride(), grad_x.stride())
    config = _gradient_configuration(x, directions)
    table.launch(
        feature_gradient,
        batch * heads * triton.cdiv(tokens, config.block_n),
        x.device,
        config,
        *(grad_output, x, projection, output, grad_x, scale, strides, heads, tokens),
        BLOCK_N=config.block_n,
        BLOCK_F=config.block_f,
        BLOCK_D=config.block_k,
        **options,
    )
    config = _direction_configuration(x, directions)
    members = batch * triton.cdiv(tokens, config.block_n)
    tiles = heads * triton.cdiv(directions, config.block_f) * triton.cdiv(head_dim, config.block_k)
    share = triton.cdiv(members, max(1, min(TARGET_PROGRAMS // tiles, members // 4)))
    chunks = triton.cdiv(members, share)
    partial = torch.empty((chunks, *projection.shape), dtype=torch.float32, device=x.device)
    table.launch(
        direction_gradient,
        tiles * chunks,
        x.device,
        config,
        *(grad_output, x, output, scale, partial, strides[:3], batch, heads, tokens, share),
        BLOCK_N=config.block_n,
        BLOCK_F=config.block_f,
        BLOCK_K=config.block_k,
        **options,
    )
    if chunks == 1:
        return grad_x, partial[0]
    grad_projection = torch.empty_like(projection)
    table.launch(
        sum_partials,
        triton.cdiv(projection.numel(), REDUCE.block_k),
        x.device,
        REDUCE,
        *(partial, grad_projection, chunks, projection.numel()),
        BLOCK=REDUCE.block_n,
        LANES=REDUCE.block_k,
    )
    return grad_x, grad_projection


def _precision(x):
    """As configurations.precision; fp16 multiplies gradients in TF32, which holds them."""
    if x.dtype == torch.float16 and table.architecture(x.device).startswith("sm"):
        return "tf32"
    return table.precision(x)
