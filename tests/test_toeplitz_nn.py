"""Modules and masks of attention with Toeplitz matrices: what they compute, load, refuse, and that they learn positions."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from conformance import backends_of, require

import effattn
from effattn.nn import KernelizedRPEAttention, URPEAttention

DIM, HEADS, TOKENS, FEATURES = 16, 2, 11, 6
GRID = (3, 4)
OPERATOR = {KernelizedRPEAttention: "kernelized_rpe_attention", URPEAttention: "urpe_attention"}
every_backend = pytest.mark.parametrize("backend", ["reference", "cpu"])
both = pytest.mark.parametrize("kind", OPERATOR, ids=lambda kind: kind.__name__)


def served(kind, backend):
    if backend not in backends_of(OPERATOR[kind]):
        pytest.skip(f"{OPERATOR[kind]} has no backend {backend}")
    require(OPERATOR[kind], backend)


def make(kind, **options):
    """A module in float64 whose tables are far from their beginning."""
    if kind is KernelizedRPEAttention:
        options = {"num_features": FEATURES, **options}
    place = {} if "grid" in options else {"num_tokens": TOKENS}
    module = kind(DIM, HEADS, **{"backend": "reference", "dtype": torch.float64, **place, **options})
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "rpe" in name or "coefficient" in name:
                parameter.normal_()
            elif name.endswith("weight"):
                parameter.normal_(std=DIM**-0.5)
    return module


def doubled(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def difference_of(length, grid=None):
    """[query, key] -> where in a table of these tokens, flattened, the entry of key minus query is."""
    width = length if grid is None else grid[1]
    height = length // width
    rows, columns = torch.arange(length) // width, torch.arange(length) % width
    down, right = rows - rows[:, None] + height - 1, columns - columns[:, None] + width - 1
    return down * (2 * width - 1) + right


def formula(module, x, padding=None):
    """The module in a few lines, an N x N matrix of each head at a time."""
    length, causal, outputs = x.shape[1], module.is_causal, []
    heads = module.qkv(x).view(len(x), length, 3, HEADS, DIM // HEADS)
    where = difference_of(length, module.grid)
    past = torch.ones(length, length, dtype=torch.bool).tril() if causal else torch.ones(length, length).bool()
    for head in range(HEADS):
        query, key, value = (heads[:, :, part, head] for part in range(3))
        bias = 0.0 if module.rpe_bias is None else module.rpe_bias[head].flatten()[where]
        if isinstance(module, KernelizedRPEAttention):
            if module.normalize_qk:
                query, key = (t / t.norm(dim=-1, keepdim=True) for t in (query, key))
            query, key = (features_of(t, module.projection, module.feature_map) for t in (query, key))
            weights = query @ key.transpose(1, 2) * torch.exp(torch.as_tensor(bias)) * past
            if padding is not None:
                weights = weights * ~padding[:, None]
            weights = weights / weights.sum(-1, keepdim=True)
        else:
            scores = query @ key.transpose(1, 2) / (DIM // HEADS) ** 0.5 + bias
            weights = torch.where(past, scores, float("-inf")).softmax(-1)
            weights = weights * module.coefficient[head].flatten()[where]
        outputs.append(weights @ value)
    return module.proj(torch.cat(outputs, -1))


def features_of(x, projection, kind):
    product, squared = x @ projection.T, x.square().sum(-1, keepdim=True)
    if kind == "positive":
        return torch.exp(product - squared / 2) / len(projection) ** 0.5
    return torch.exp(squared / 2) * torch.cat((product.sin(), product.cos()), -1) / len(projection) ** 0.5


def gradients_of(output, x, module):
    generator = torch.Generator().manual_seed(7)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    names, parameters = zip(*module.named_parameters())
    return dict(zip(("x", *names), torch.autograd.grad(output, (x, *parameters), grad)))


def assert_equal_with_gradients(module, x, got, wanted, tolerance=1e-10):
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    theirs = gradients_of(wanted, x, module)
    for name, gradient in gradients_of(got, x, module).items():
        assert gradient.any(), name
        torch.testing.assert_close(gradient, theirs[name], rtol=tolerance, atol=tolerance, msg=name)


# ---- what they compute ----


@pytest.mark.parametrize("place", [{}, {"grid": GRID}], ids=["sequence", "grid"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{}, {"normalize_qk": False}, {"feature_map": "trigonometric"}], ids=str)
def test_kernelized_attention_is_its_formula_and_every_parameter_gets_its_gradient(place, causal, options):
    module = make(KernelizedRPEAttention, is_causal=causal, **place, **options)
    x = doubled(2, 12 if place else TOKENS, DIM).requires_grad_()
    # weights of either sign cancel, and more so without the length of queries and keys
    tolerance = 1e-6 if options.get("feature_map") == "trigonometric" else 1e-10
    assert_equal_with_gradients(module, x, module(x), formula(module, x), tolerance)


@pytest.mark.parametrize("place", [{}, {"grid": GRID}], ids=["sequence", "grid"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_urpe_attention_is_its_formula_and_every_parameter_gets_its_gradient(place, causal, bias):
    module = make(URPEAttention, is_causal=causal, rpe_bias=bias, **place)
    assert ("rpe_bias" in dict(module.named_parameters())) == bias
    x = doubled(2, 12 if place else TOKENS, DIM).requires_grad_()
    assert_equal_with_gradients(module, x, module(x), formula(module, x))


def test_padding_takes_keys_away():
    module, x = make(KernelizedRPEAttention), doubled(2, TOKENS, DIM)
    padding = torch.zeros(2, TOKENS, dtype=torch.bool)
    padding[0, 7:] = padding[1, 2] = True
    got = module(x, key_padding_mask=padding)
    torch.testing.assert_close(got, formula(module, x, padding))
    torch.testing.assert_close(got[0, :7], module(x[:1, :7])[0])


@every_backend
@both
@pytest.mark.parametrize("place", [{}, {"grid": GRID}], ids=["sequence", "grid"])
def test_in_float32_the_module_is_as_exact_as_its_formula(kind, place, backend):
    served(kind, backend)
    exact = make(kind, is_causal=True, **place)
    module = make(kind, is_causal=True, backend=backend, dtype=torch.float32, **place)
    module.load_state_dict(exact.state_dict())
    exact.load_state_dict(module.state_dict())
    x = torch.randn(2, 12 if place else TOKENS, DIM)
    leaf, double = x.requires_grad_(), x.detach().double().requires_grad_()
    got, low, wanted = module(leaf), formula(module, leaf), exact(double)
    ours, eager, true = (
        {"output": out.detach(), **gradients_of(out, of, m)}
        for out, of, m in ((got, leaf, module), (low, leaf, module), (wanted, double, exact))
    )
    for name, value in true.items():
        budget = 3 * (eager[name] - value).abs().max() + 1e-6 * value.abs().max()
        assert (ours[name] - value).abs().max() <= budget, name


@both
@pytest.mark.parametrize("causal", [False, True])
def test_shorter_sequences_use_the_middle_of_the_tables(kind, causal):
    long, x = make(kind, is_causal=causal), doubled(2, 5, DIM)
    short = make(kind, is_causal=causal, num_tokens=5)
    state = long.state_dict()
    for name in ("rpe_bias", "coefficient"):
        if name in state:
            state[name] = state[name][:, TOKENS - 5 : TOKENS + 4]
    short.load_state_dict(state)
    torch.testing.assert_close(long(x), short(x))
    assert long(x[:, :1]).isfinite().all()
    assert long(x[:, :0]).shape == (2, 0, DIM)
    if causal:  # what came before does not depend on how much follows
        torch.testing.assert_close(long(x)[:, :3], long(x[:, :3]))


@both
def test_an_image_is_its_tokens_in_raster_order_and_may_be_smaller(kind):
    module, image = make(kind, grid=GRID), doubled(2, *GRID, DIM)
    out = module(image)
    assert out.shape == image.shape
    torch.testing.assert_close(out.flatten(1, 2), module(image.flatten(1, 2)))
    small, state = make(kind, grid=(2, 3)), module.state_dict()
    for name in ("rpe_bias", "coefficient"):
        if name in state:
            state[name] = state[name][:, 1:-1, 1:-1]
    small.load_state_dict(state)
    torch.testing.assert_close(module(image[:, :2, :3]), small(image[:, :2, :3]))


def test_urpe_begins_as_softmax_attention():
    module = URPEAttention(DIM, HEADS, num_tokens=TOKENS, rpe_bias=False, backend="reference")
    x = torch.randn(2, TOKENS, DIM)
    query, key, value = module.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    plain = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module(x), module.proj(plain))


# ---- random features ----


def test_redrawing_changes_the_directions_in_place_and_keeps_them_orthogonal():
    module = make(KernelizedRPEAttention, num_features=20)
    x, before, storage = doubled(1, 4, DIM), module.projection.clone(), module.projection.data_ptr()
    first = module(x)
    module.redraw_projection()
    assert module.projection.data_ptr() == storage
    assert not torch.equal(module.projection, before)
    assert not torch.equal(module(x), first)
    head_dim = DIM // HEADS
    for block in (before[:head_dim], *module.projection.split(head_dim)):
        gram = block @ block.T
        torch.testing.assert_close(gram, gram.diag().diag(), rtol=0, atol=1e-5)
    independent = make(KernelizedRPEAttention, orthogonal=False).projection
    assert (independent @ independent.T).fill_diagonal_(0).abs().max() > 0.1


def test_redrawing_with_a_generator_can_be_repeated():
    module = make(KernelizedRPEAttention, dtype=torch.float32)
    drawn = []
    for seed in (3, 4, 3):
        module.redraw_projection(torch.Generator().manual_seed(seed))
        drawn.append(module.projection.clone())
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    head_dim = DIM // HEADS
    wanted = effattn.random_features(FEATURES, head_dim, generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn[0], wanted)


@pytest.mark.parametrize("kind", ["positive", "trigonometric"])
def test_features_are_an_unbiased_estimate_of_the_exponential_and_orthogonal_ones_vary_less(kind):
    """The mean of many draws is exp(q.k) within its standard error; with orthogonal blocks the spread is smaller."""
    generator = torch.Generator().manual_seed(11)
    query, key = F.normalize(torch.randn(2, 30, 8, generator=generator, dtype=torch.float64), dim=-1)
    exact, spread = (query * key).sum(-1).exp(), {}
    for orthogonal in (True, False):
        draws = torch.stack(
            [effattn.random_features(8, 8, orthogonal=orthogonal, generator=generator).double() for _ in range(2000)]
        )
        maps = (effattn.reference.toeplitz.feature_map(t[None, None], draws, kind)[0] for t in (query, key))
        estimates = torch.einsum("snm,snm->sn", *maps)
        deviation = estimates.std(0)
        assert ((estimates.mean(0) - exact).abs() <= 4 * deviation / len(draws) ** 0.5).all()
        spread[orthogonal] = deviation.square().mean()
    assert spread[True] < 0.9 * spread[False]


def test_many_features_come_close_to_softmax_attention_with_the_bias():
    module = make(KernelizedRPEAttention, num_features=1 << 14, num_tokens=TOKENS)
    x = doubled(1, TOKENS, DIM)
    query, key, value = module.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    bias = module.rpe_bias[:, difference_of(TOKENS)]
    exact = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
    wanted = module.proj(exact.transpose(1, 2).flatten(2))
    assert (module(x) - wanted).abs().max() < 0.03 * wanted.abs().max()


# ---- state ----


@both
def test_state_dicts_pass_from_one_module_to_another_across_dtypes(kind):
    module, x = make(kind), doubled(2, TOKENS, DIM)
    own = {"rpe_bias", "projection"} if kind is KernelizedRPEAttention else {"rpe_bias", "coefficient"}
    linear = {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    assert set(module.state_dict()) == own | linear
    other = make(kind)
    assert not torch.equal(other(x), module(x))
    assert not any(other.load_state_dict(module.state_dict()))
    assert torch.equal(other(x), module(x))
    half = make(kind, dtype=torch.bfloat16)
    half.load_state_dict(module.state_dict())
    assert {t.dtype for t in half.state_dict().values()} == {torch.bfloat16}
    for name, tensor in module.bfloat16().state_dict().items():
        assert torch.equal(half.state_dict()[name], tensor), name
    moved = make(kind, device="meta")
    assert moved(x.to("meta")).shape == x.shape
    moved = moved.to_empty(device="cpu")
    moved.load_state_dict(other.state_dict())
    assert torch.equal(moved(x), other(x))
    assigned = make(kind, device="meta")
    assigned.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(assigned(x), other(x))


@both
def test_the_state_dict_of_a_vision_transformers_attention_loads_and_leaves_the_tables(kind):
    theirs = {
        "qkv.weight": doubled(3 * DIM, DIM),
        "qkv.bias": doubled(3 * DIM),
        "proj.weight": doubled(DIM, DIM),
        "proj.bias": doubled(DIM),
    }
    module = torch.nn.Sequential(make(kind))
    own = {name: t.clone() for name, t in module[0].state_dict().items() if name not in theirs}
    given = {f"0.{name}": tensor for name, tensor in theirs.items()}
    assert not any(module.load_state_dict(given))
    assert given.keys() == {f"0.{name}" for name in theirs}
    for name, tensor in {**theirs, **own}.items():
        assert torch.equal(module[0].state_dict()[name], tensor)
    given["0.rpe_bias"] = own["rpe_bias"]
    with pytest.raises(RuntimeError, match="Missing key"):  # one of two is a broken file and not another module's
        module.load_state_dict(given)
    plain = make(kind, qkv_bias=False)
    assert plain.qkv.bias is None


@both
def test_modules_are_initialised_as_a_vision_transformer(kind):
    features = {"num_features": 8} if kind is KernelizedRPEAttention else {}
    module = kind(256, 8, num_tokens=200, **features)
    for weight in (module.qkv.weight, module.proj.weight, module.rpe_bias):
        assert abs(weight.std() / 0.02 - 1) < 0.05
    assert not module.qkv.bias.any()
    assert module.rpe_bias.shape == (8, 399)
    if kind is URPEAttention:
        assert (module.coefficient == 1).all()
        assert module.coefficient.shape == (8, 399)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.reset_parameters()
    fixed = {"qkv.bias", "proj.bias", "coefficient"}
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name in fixed), name


@both
def test_modules_copy_and_pickle(kind):
    module, x, saved = make(kind), doubled(1, TOKENS, DIM), io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(saved, weights_only=False)):
        assert torch.equal(other(x), module(x))
        assert repr(other) == repr(module)
    assert f"num_heads={HEADS}" in repr(module)
    assert f"num_tokens={TOKENS}" in repr(module)
    assert f"grid={GRID}" in repr(make(kind, grid=GRID))


# ---- how they run ----


@both
def test_autocast_computes_in_bfloat16_and_trains_the_parameters_in_float32(kind):
    module, x = make(kind, dtype=torch.float32), torch.randn(2, TOKENS, DIM)
    exact = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(parameter.grad.dtype == torch.float32 and parameter.grad.any() for parameter in module.parameters())
    assert (out - exact).abs().max() < 0.1 * exact.abs().max()


@every_backend
@both
def test_a_training_step_compiles_to_one_graph(kind, backend):
    served(kind, backend)
    torch._dynamo.reset()
    module = make(kind, backend=backend, dtype=torch.float32)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for tokens in (TOKENS, 7) if backend == "cpu" else (7,):  # the second one with a length that may vary
        x = torch.randn(2, tokens, DIM).requires_grad_()
        wanted, got = module(x), compiled(x)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        theirs = gradients_of(wanted, x, module)
        for name, gradient in gradients_of(got, x, module).items():
            torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-5)


@both
def test_dropout_is_of_training_only(kind):
    dropped = [{"proj_drop": 0.5}] + [{"attn_drop": 0.5}] * (kind is URPEAttention)
    for options in dropped:
        module, x = make(kind, **options), doubled(2, TOKENS, DIM)
        assert not torch.equal(module(x), module(x))
        plain = make(kind)
        plain.load_state_dict(module.state_dict())
        assert torch.equal(module.eval()(x), plain(x))


@every_backend
@both
def test_a_task_of_relative_positions_is_learned(kind, backend):
    """Say which token stood three before. Tokens are independent, so that only the tables can know where to look."""
    served(kind, backend)
    torch.manual_seed(1)
    tokens, vocabulary, back = 24, 8, 3
    options = {"num_features": 16} if kind is KernelizedRPEAttention else {}
    attention = kind(32, 2, num_tokens=tokens, backend=backend, **options)
    embed, head = torch.nn.Embedding(vocabulary, 32), torch.nn.Linear(32, vocabulary)
    model = torch.nn.Sequential(embed, attention, head)
    tables = [parameter for name, parameter in attention.named_parameters() if name in attention.own]
    rest = [parameter for parameter in model.parameters() if all(parameter is not table for table in tables)]
    optimizer = torch.optim.Adam([{"params": tables, "lr": 0.1}, {"params": rest, "lr": 0.01}])

    def loss_and_accuracy():
        text = torch.randint(vocabulary, (32, tokens))
        logits, wanted = model(text)[:, back:], text[:, :-back]
        right = (logits.argmax(-1) == wanted).float().mean().item()
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten()), right

    for _ in range(60):
        optimizer.zero_grad()
        loss_and_accuracy()[0].backward()
        optimizer.step()
    with torch.no_grad():
        assert loss_and_accuracy()[1] > 0.95
        assert (attention.rpe_bias.argmax(-1) == tokens - 1 - back).any()
        attention.rpe_bias.zero_()
        if kind is URPEAttention:
            attention.coefficient.fill_(1.0)
        assert loss_and_accuracy()[1] < 0.5


# ---- masks ----


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True, "eps": 1e-3, "method": "direct"},
        {"feature_map": "trigonometric", "normalize_qk": False},
        {"grid": GRID, "key_padding_mask": torch.arange(12)[None] > 8},
    ],
    ids=["plain", "causal", "trigonometric", "grid"],
)
def test_stock_sdpa_takes_kernelized_attention(options):
    query, key, value = torch.randn(3, 1, 2, 12, 8)
    shape = (2, 5, 7) if "grid" in options else (2, 23)
    bias, projection = torch.randn(shape, requires_grad=True), effattn.random_features(4, 8)
    mask = effattn.KernelizedRPE(bias, projection, **options)
    assert isinstance(mask, effattn.StructuredMask)
    got = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert torch.equal(got, effattn.kernelized_rpe_attention(query, key, value, bias, projection, **options))
    assert torch.autograd.grad(got.sum(), bias)[0].any()
    plain = effattn.scaled_dot_product_attention(query, key, value, mask, backend="reference")
    torch.testing.assert_close(got, plain, rtol=1e-3, atol=1e-4)


def test_kernelized_attention_refuses_what_it_has_not():
    query = torch.randn(1, 2, 5, 8)
    mask = effattn.KernelizedRPE(torch.zeros(2, 9), effattn.random_features(4, 8))
    with pytest.raises(ValueError, match="KernelizedRPE: dropout_p must be 0"):
        F.scaled_dot_product_attention(query, query, query, attn_mask=mask, dropout_p=0.5)
    with pytest.raises(ValueError, match="KernelizedRPE: scale must be None"):
        F.scaled_dot_product_attention(query, query, query, attn_mask=mask, scale=0.5)
    with pytest.raises(ValueError, match="is_causal must be False with a structured attn_mask"):
        F.scaled_dot_product_attention(query, query, query, attn_mask=mask, is_causal=True)
    with pytest.raises(NotImplementedError, match="no dense form"):
        mask.dense()
    assert repr(mask) == (
        "KernelizedRPE(rpe_bias=(2, 9), num_features=4, feature_map='positive', grid=None, is_causal=False, "
        "method='auto')"
    )
    identity = effattn.KernelizedRPE(torch.zeros(1, 9), feature_map="identity")
    assert "num_features=None" in repr(identity)
    out = F.scaled_dot_product_attention(query.exp(), query.exp(), query, attn_mask=identity)
    assert out.isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [2, 1])
@pytest.mark.parametrize("grid", [None, GRID])
def test_a_relative_position_bias_is_the_dense_mask_that_it_stands_for(causal, heads, grid):
    query, key, value = torch.randn(3, 2, 2, 12, 8)
    shape = (heads, 23) if grid is None else (heads, 5, 7)
    bias = torch.randn(shape, requires_grad=True)
    mask = effattn.RelativePositionBias(bias, grid=grid, is_causal=causal)
    dense = mask.dense()
    assert dense.shape == (heads, 12, 12)
    allowed = torch.ones(12, 12, dtype=torch.bool).tril() if causal else torch.ones(12, 12, dtype=torch.bool)
    where = difference_of(12, grid)
    assert torch.equal(dense.detach(), bias.detach().flatten(1)[:, where].masked_fill(~allowed, float("-inf")))
    got = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.4)
    wanted = F.scaled_dot_product_attention(query, key, value, attn_mask=dense, scale=0.4)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(out.square().sum(), bias, retain_graph=True)[0] for out in (got, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("grid", [None, GRID])
@pytest.mark.parametrize("bias", [True, False])
def test_stock_sdpa_takes_urpe(grid, bias):
    query, key, value = torch.randn(3, 2, 2, 12, 8)
    shape = (2, 23) if grid is None else (2, 5, 7)
    coefficient = torch.randn(shape, requires_grad=True)
    bias = torch.randn(shape) if bias else None
    mask = effattn.RelativePositionBias(bias, coefficient, grid=grid, is_causal=True)
    got = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.4)
    wanted = effattn.urpe_attention(query, key, value, coefficient, bias, grid=grid, is_causal=True, scale=0.4)
    assert torch.equal(got, wanted)
    assert torch.autograd.grad(got.sum(), coefficient)[0].any()
    with pytest.raises(NotImplementedError, match="multiplies the weights"):
        mask.dense()
    dropped = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=0.5)
    assert not torch.equal(dropped, F.scaled_dot_product_attention(query, key, value, attn_mask=mask))


def test_masks_of_relative_positions_repeat_heads_and_print():
    query, key = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    mask = effattn.RelativePositionBias(torch.randn(4, 11))
    got = F.scaled_dot_product_attention(query, key, key, attn_mask=mask, enable_gqa=True)
    repeated = key.repeat_interleave(2, 1)
    assert torch.equal(got, effattn.urpe_attention(query, repeated, repeated, None, mask.rpe_bias))
    assert repr(mask) == "RelativePositionBias(rpe_bias=(4, 11), coefficient=None, grid=None, is_causal=False)"
    with pytest.raises(ValueError, match="RelativePositionBias: rpe_bias or coefficient must be given"):
        effattn.RelativePositionBias(None)
    explanation = effattn.explain(F.scaled_dot_product_attention, query, query, query, attn_mask=mask)
    assert explanation.op == "urpe_attention"
    kernelized = effattn.KernelizedRPE(mask.rpe_bias, effattn.random_features(4, 8), method="direct")
    explanation = effattn.explain(F.scaled_dot_product_attention, query, query, query, attn_mask=kernelized)
    assert explanation.op == "kernelized_rpe_attention"


# ---- what they refuse ----


@both
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"embed_dim": 15, "num_tokens": 3}, ValueError, "embed_dim 15 must be a multiple of num_heads 2"),
        ({"embed_dim": 16.0, "num_tokens": 3}, TypeError, "embed_dim must be an int"),
        ({"num_heads": 0, "num_tokens": 3}, ValueError, "num_heads must be at least 1"),
        ({}, ValueError, "one of num_tokens and grid must be given"),
        ({"num_tokens": 12, "grid": (3, 4)}, ValueError, "one of num_tokens and grid must be given"),
        ({"num_tokens": 0}, ValueError, "num_tokens must be at least 1"),
        ({"grid": (3, 0)}, ValueError, "grid width must be at least 1"),
        ({"grid": 12}, TypeError, "grid must be a pair"),
        ({"num_tokens": 3, "is_causal": 1}, TypeError, "is_causal must be a bool"),
        ({"num_tokens": 3, "proj_drop": 1.0}, ValueError, "proj_drop must be in"),
    ],
)
def test_modules_refuse_what_they_cannot_be(kind, options, error, message):
    options = {"embed_dim": DIM, "num_heads": HEADS, **options}
    if kind is KernelizedRPEAttention:
        options["num_features"] = FEATURES
    with pytest.raises(error, match=f"{kind.__name__}: {message}"):
        kind(**options)


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        (KernelizedRPEAttention, {"num_features": 0}, ValueError, "num_features must be at least 1"),
        (KernelizedRPEAttention, {"feature_map": "identity"}, ValueError, "feature_map must be one of positive, tri"),
        (KernelizedRPEAttention, {"method": "ring"}, ValueError, "method must be one of auto, direct"),
        (KernelizedRPEAttention, {"eps": -1.0}, ValueError, "eps must be at least 0"),
        (URPEAttention, {"rpe_bias": 1}, TypeError, "rpe_bias must be a bool"),
        (URPEAttention, {"attn_drop": 1.0}, ValueError, "attn_drop must be in"),
    ],
)
def test_a_module_refuses_what_it_alone_cannot_be(kind, options, error, message):
    with pytest.raises(error, match=f"{kind.__name__}: {message}"):
        make(kind, **options)


@both
def test_modules_refuse_what_they_cannot_take(kind):
    sequence, image = make(kind), make(kind, grid=GRID)
    name = kind.__name__
    with pytest.raises(TypeError, match=f"{name}: x must be a Tensor"):
        sequence([1.0])
    for module, shape in ((sequence, (1, 4, 9)), (sequence, (4, DIM)), (sequence, (1, 3, 4, DIM)), (image, (4, DIM))):
        with pytest.raises(ValueError, match=f"{name}: x must have shape"):
            module(doubled(*shape))
    with pytest.raises(ValueError, match=f"{name}: x has 12 tokens, at most 11 are allowed"):
        sequence(doubled(1, 12, DIM))
    with pytest.raises(ValueError, match=f"{name}: x has 4 x 3 tokens, at most 3 x 4 are allowed"):
        image(doubled(1, 4, 3, DIM))
    with pytest.raises(ValueError, match="query has 11 tokens, but grid 3 x 4 makes 12"):
        image(doubled(1, 11, DIM))
