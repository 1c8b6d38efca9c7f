"""effattn.patch, unpatch and replace_sdpa on modules of timm's attribute names and of torch."""

import copy
import math
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from effattn.bench import vit
from torch import nn

import effattn

IMAGES = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))


class WindowAttention(nn.Module):
    """The attributes of timm's."""

    def __init__(self, dim, num_heads, window_size):
        super().__init__()
        rows, columns = window_size
        self.window_size, self.window_area, self.num_heads = window_size, rows * columns, num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * rows - 1) * (2 * columns - 1), num_heads))
        y, x = (t.flatten() for t in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
        index = (y[:, None] - y + rows - 1) * (2 * columns - 1) + x[:, None] - x + columns - 1
        self.register_buffer("relative_position_index", index, persistent=False)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop, self.softmax = nn.Dropout(0.0), nn.Dropout(0.0), nn.Softmax(-1)

    def forward(self, x, mask=None):
        windows, tokens, _ = x.shape
        query, key, value = self.qkv(x).reshape(windows, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = self.scale * query @ key.mT
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        scores = scores + bias.view(tokens, tokens, -1).permute(2, 0, 1)
        if mask is not None:
            scores = scores.unflatten(0, (-1, len(mask))) + mask[None, :, None]
            scores = scores.flatten(0, 1)
        out = self.attn_drop(self.softmax(scores)) @ value
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class SwinTransformerBlock(nn.Module):
    def __init__(self, dim, input_resolution, num_heads, window_size, shift_size, dynamic_mask=False):
        super().__init__()
        self.input_resolution, self.window_size, self.shift_size = input_resolution, window_size, shift_size
        self.dynamic_mask, self.window_area = dynamic_mask, math.prod(window_size)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = WindowAttention(dim, num_heads, window_size), vit.Mlp(dim)
        self.drop_path1, self.drop_path2 = nn.Identity(), nn.Identity()
        self.register_buffer("attn_mask", None if dynamic_mask else self.get_attn_mask(input_resolution), False)

    def get_attn_mask(self, grid):
        if not any(self.shift_size):
            return None
        rows, columns = (-(-extent // size) * size for extent, size in zip(grid, self.window_size))
        regions = torch.zeros(1, rows, columns, 1)
        for axis, (size, shift) in enumerate(zip(self.window_size, self.shift_size)):
            for area, start in ((1, -size), (2, -shift)):
                regions.select(0, 0).transpose(0, axis)[start:] += area * 3**axis
        windows = self.partition(regions).squeeze(-1)
        return torch.where(windows[:, None] == windows[:, :, None], 0.0, -100.0)

    def partition(self, x):
        batch, rows, _, width = x.shape
        x = x.view(batch, rows // self.window_size[0], self.window_size[0], -1, self.window_size[1], width)
        return x.transpose(2, 3).reshape(-1, self.window_area, width)

    def _attn(self, x):
        batch, rows, columns, width = x.shape
        x = x.roll([-shift for shift in self.shift_size], (1, 2))
        x = F.pad(x, (0, 0, 0, -columns % self.window_size[1], 0, -rows % self.window_size[0]))
        padded = x.shape
        mask = self.get_attn_mask(padded[1:3]) if self.dynamic_mask else self.attn_mask
        out = self.attn(self.partition(x), mask=mask)
        out = out.view(batch, padded[1] // self.window_size[0], -1, *self.window_size, width).transpose(2, 3)
        return out.reshape(padded)[:, :rows, :columns].roll(self.shift_size, (1, 2))

    def forward(self, x):
        x = x + self.drop_path1(self._attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


def swin(grid=(8, 12), window=(4, 4), **options):
    torch.manual_seed(0)
    return nn.Sequential(*(SwinTransformerBlock(16, grid, 2, window, shift, **options) for shift in ((0, 0), (2, 1))))


def vision():
    return vit.VisionTransformer(vit.TINY).eval()


def describe(model):
    classes = {name: type(module) for name, module in model.named_modules()}
    entries = {name: set(vars(module)) for name, module in model.named_modules()}
    return classes, entries, {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model, before):
    classes, entries, state = describe(model)
    assert classes == before[0]
    assert entries == before[1]
    assert list(state) == list(before[2])
    assert all(torch.equal(value, before[2][name]) for name, value in state.items())


def gaussians(name, module, parameter=True):
    make = nn.Parameter if parameter else (lambda tensor: tensor)
    return effattn.GaussianMixtureMask(make(torch.ones(2, 3)), make(torch.full((2, 3), 1.5)), (6, 6), 1)


MODELS = {
    "vision transformer": (vision, IMAGES),
    "swin": (swin, torch.randn(2, 8, 12, 16)),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval(),
        torch.randn(2, 5, 16),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_unpatch_restores_classes_entries_state_and_outputs(name):
    make, inputs = MODELS[name]
    model = make().eval()
    before, expected = describe(model), model(inputs)
    done = effattn.patch(model, example=inputs)
    assert len(done.touched) >= 2
    assert done.skipped == {}
    assert describe(model)[0] != before[0]
    torch.testing.assert_close(model(inputs), expected, rtol=1e-4, atol=1e-5)
    effattn.unpatch(model)
    assert_unchanged(model, before)
    assert torch.equal(model(inputs), expected)
    with pytest.raises(ValueError, match="unpatch: model is not one that patch has changed"):
        effattn.unpatch(model)


@pytest.mark.parametrize("name", MODELS)
def test_a_patched_model_has_the_same_gradients(name):
    make, inputs = MODELS[name]
    model = make().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    other = copy.deepcopy(model)
    effattn.patch(model)
    model(inputs).sin().sum().backward()
    other(inputs).sin().sum().backward()
    for (key, parameter), expected in zip(model.named_parameters(), other.parameters()):
        error = (parameter.grad - expected.grad).abs().max()
        assert error <= 1e-4 * max(expected.grad.abs().max(), 1e-2), key


@pytest.mark.parametrize("name", MODELS)
def test_a_patched_layer_compiles_in_one_graph(name):
    make, inputs = MODELS[name]
    model = make().eval()
    effattn.patch(model)
    layer = {"vision transformer": lambda: model.blocks[0].attn, "swin": lambda: model[1]}.get(
        name, lambda: model.layers[0]
    )()
    inputs = torch.randn(2, 37, 24) if name == "vision transformer" else inputs
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs), layer(inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("through", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_are_patched_models_of_their_own(through):
    model = vision()
    expected = model(IMAGES)
    effattn.patch(model, [("blocks.0.attn", gaussians), ("*", "exact")])
    copied = through(model)
    assert torch.equal(copied(IMAGES), model(IMAGES))
    with torch.no_grad():
        copied.blocks[0].attn.effattn_alpha.zero_()
    assert not torch.equal(copied(IMAGES), model(IMAGES))
    effattn.unpatch(copied)
    assert torch.equal(copied(IMAGES), expected)
    assert type(model.blocks[0].attn).__name__ == "PatchedAttention"


def test_a_patched_model_is_checkpointed():
    model = vision().train()
    effattn.patch(model, gaussians)
    gradients = []
    for model.grad_checkpointing in (False, True):
        model.zero_grad()
        model(IMAGES).square().sum().backward()
        gradients.append(model.blocks[1].attn.effattn_alpha.grad.clone())
    assert torch.equal(*gradients)
    assert gradients[0].abs().sum() > 0


def test_swin_blocks_compute_the_same_on_grids_of_other_sizes():
    model = swin(dynamic_mask=True).eval()
    grids = [torch.randn(1, rows, columns, 16) for rows, columns in ((8, 12), (10, 12), (4, 8))]
    expected = [model(x) for x in grids]
    effattn.patch(model)
    for x, wanted in zip(grids, expected):
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_backend_reaches_the_operator(name):
    make, inputs = MODELS[name]
    model = make().eval()
    effattn.patch(model)
    effattn.patch(other := make().eval(), backend="reference")
    assert effattn.explain(other, inputs).requested == "reference"
    operator = "window_attention" if name == "swin" else "scaled_dot_product_attention"
    assert effattn.explain(model, inputs).op == operator


def test_swin_blocks_whose_grid_needs_padding_are_skipped():
    done = effattn.patch(swin(grid=(10, 12)))
    assert done.touched == {}
    assert "do not divide its grid" in done.skipped["0.attn"]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("self_attention", [False, True])
def test_multihead_attention_is_the_same_with_every_mask(batch_first, self_attention):
    torch.manual_seed(0)
    widths = {} if self_attention else {"kdim": 12, "vdim": 20}
    attention = nn.MultiheadAttention(16, 2, batch_first=batch_first, bias=self_attention, **widths)
    other = copy.deepcopy(attention)
    effattn.patch(attention)
    query = torch.randn(3, 6, 16)
    key, value = (query, query) if self_attention else (torch.randn(3, 6, 12), torch.randn(3, 6, 20))
    if not batch_first:
        key_is_query = key is query
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        key, value = (query, query) if key_is_query else (key, value)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = True
    causal = torch.ones(6, 6, dtype=torch.bool).triu(1)
    for options in (
        {},
        {"key_padding_mask": padding},
        {"attn_mask": causal},
        {"attn_mask": causal, "is_causal": True},
        {"attn_mask": causal, "key_padding_mask": padding, "is_causal": True},
        {"attn_mask": torch.randn(6, 6)},
        {"attn_mask": torch.randn(6, 6, 6), "key_padding_mask": torch.randn(3, 6)},
    ):
        expected = other(query, key, value, need_weights=False, **options)
        out = attention(query, key, value, need_weights=False, **options)
        assert out[1] is None
        torch.testing.assert_close(out[0], expected[0], rtol=1e-4, atol=1e-5)
    expected, out = other(query, key, value), attention(query, key, value)
    assert torch.equal(out[0], expected[0])
    assert torch.equal(out[1], expected[1])
    with pytest.raises(RuntimeError, match="is_causal"):
        attention(query, key, value, need_weights=False, is_causal=True)


def test_a_mask_acts_inside_the_inference_path_of_an_encoder_layer():
    model = MODELS["encoder"][0]()
    x = MODELS["encoder"][1]
    effattn.patch(model, effattn.RetentionDecay(effattn.retnet_log_decay(2)))
    trained = model(x)  # gradients are on: torch takes no inference path
    with torch.no_grad():
        torch.testing.assert_close(model(x), trained)
        with pytest.raises(NotImplementedError, match="RetentionDecay"):
            model(x, src_key_padding_mask=torch.tensor([[False] * 5, [False] * 3 + [True] * 2]))
    with pytest.raises(NotImplementedError, match="need_weights=True"):
        model.layers[0].self_attn(x, x, x)
    effattn.unpatch(model)
    assert type(model.layers[0]) is nn.TransformerEncoderLayer


def test_parameters_of_a_mask_are_trained_and_saved_and_moved_with_the_layer():
    model = vision()
    before = describe(model)
    done = effattn.patch(model, gaussians)
    assert set(done.touched.values()) == {"GaussianMixtureMask, another function than before"}
    assert "blocks.2.attn.effattn_sigma" in model.state_dict()
    expected = model(IMAGES)
    expected.sum().backward()
    assert all(
        block.attn.effattn_alpha.grad.abs().sum() > 0 for block in model.blocks[:2]
    )  # the last: the class token is read
    torch.testing.assert_close(model.double()(IMAGES.double()).float(), expected, rtol=1e-4, atol=1e-5)
    attention, x = model.float().blocks[0].attn, torch.randn(1, 37, 24)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), attention(x), rtol=1e-4, atol=1e-5)
    effattn.unpatch(model)
    assert list(describe(model)[2]) == list(before[2])


def test_rules_choose_layers_by_the_first_match():
    model = vision()
    done = effattn.patch(
        model, [("blocks.0.*", None), (lambda name, module: name.startswith("blocks.1"), gaussians), ("*.0.*", "exact")]
    )
    assert list(done.touched) == ["blocks.1.attn"]
    assert done.skipped == {"blocks.0.attn": "its rule is None", "blocks.2.attn": "no rule matches it"}
    assert "2 left alone" in str(done)
    done.revert()
    assert type(model.blocks[1].attn) is vit.Attention


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ({"nothing.*": "exact"}, ValueError, r"'nothing\.\*' matches no attention layer"),
        ("fast", ValueError, "rules must be 'exact'"),
        (3, TypeError, "rules must be a rule"),
        ({"*": 3}, TypeError, "a rule must be"),
        (lambda name, module: 3, TypeError, "must return a structured mask or None"),
        (effattn.CrossShapedWindow((5, 5), 5), ValueError, "does not run with CrossShapedWindow"),
        (effattn.GaussianMixtureMask(torch.ones(1, 2), torch.ones(1, 2), (6, 6)), ValueError, "does not run with"),
    ],
)
def test_wrong_rules_are_refused_and_change_nothing(rules, error, message):
    model = vision()
    before = describe(model)
    with pytest.raises(error, match=message):
        effattn.patch(model, rules)
    assert_unchanged(model, before)


def test_a_patched_model_is_not_patched_again():
    model = nn.ModuleDict({"inner": vision()})
    effattn.patch(model["inner"])
    with pytest.raises(ValueError, match="patched already"):
        effattn.patch(model["inner"])
    assert "part of another model" in effattn.patch(model).skipped["inner.blocks.0.attn"]


class Sharper(vit.Attention):
    def forward(self, x):
        return super().forward(2 * x)


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(24, 24)

    def forward(self, x):
        return self.query(x)


def test_layers_that_compute_something_else_are_skipped():
    model = vision()
    model.blocks[0].attn = Sharper(24, 3)
    model.blocks[1].attn = Unknown()
    nn.utils.parametrize.register_parametrization(model.blocks[2].attn.qkv, "weight", nn.Identity())
    done = effattn.patch(model, example=IMAGES)
    assert "something else" in done.skipped["blocks.0.attn"]
    assert "does not know (Unknown)" in done.skipped["blocks.1.attn"]
    assert list(done.touched) == ["blocks.2.attn"]


def test_a_model_whose_outputs_change_is_reverted():
    class Peeking(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = vision()

        def forward(self, images):
            return self.body(images) + (type(self.body.blocks[0].attn) is vit.Attention)

    model = Peeking()
    before = describe(model)
    with pytest.raises(RuntimeError, match=r"reverted.*output 0 differs by 1"):
        effattn.patch(model, example=IMAGES)
    assert_unchanged(model, before)
    assert len(effattn.patch(model, example=IMAGES, check=False).touched) == 3


def test_checks_leave_modes_buffers_and_random_numbers_alone():
    model = nn.Sequential(nn.BatchNorm2d(3), vision())
    model.train()
    model[1].blocks[1].eval()
    before, modes = describe(model), [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    effattn.patch(model, example=IMAGES)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    effattn.unpatch(model)
    assert_unchanged(model, before)


def test_hooks_stay():
    model, seen = vision(), []
    hook = model.blocks[0].attn.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    effattn.patch(model, example=IMAGES)
    seen.clear()
    model(IMAGES)
    effattn.unpatch(model)
    model(IMAGES)
    assert len(seen) == 2
    hook.remove()


# ---- replace_sdpa ----

QUERY = torch.randn(2, 3, 12, 8, generator=torch.Generator().manual_seed(2))
DECAY = effattn.ManhattanDecay(effattn.rmt_log_decay(3), (3, 4))
RETENTION = effattn.RetentionDecay(effattn.retnet_log_decay(3))


def call(x):
    return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize("function", [call, lambda x: effattn.scaled_dot_product_attention(x, x, x)])
def test_replaced_calls_get_the_mask_and_nothing_else_does(function):
    plain, expected = function(QUERY), F.scaled_dot_product_attention(QUERY, QUERY, QUERY, attn_mask=DECAY)
    with effattn.replace_sdpa(DECAY):
        assert torch.equal(function(QUERY), expected)
        with effattn.replace_sdpa(RETENTION):
            inner = function(QUERY)
        assert torch.equal(function(QUERY), expected)
    assert torch.equal(inner, effattn.retention(QUERY, QUERY, QUERY, RETENTION.log_decay))
    assert torch.equal(function(QUERY), plain)
    assert torch.equal(effattn.replace_sdpa(DECAY)(function)(QUERY), expected)


def test_an_exception_ends_the_replacement():
    plain = call(QUERY)
    with pytest.raises(KeyError), effattn.replace_sdpa(DECAY):
        raise KeyError
    assert torch.equal(call(QUERY), plain)


def test_other_threads_are_not_replaced():
    plain, seen = call(QUERY), []
    with effattn.replace_sdpa(DECAY):
        thread = threading.Thread(target=lambda: seen.append(call(QUERY)))
        thread.start()
        thread.join()
    assert torch.equal(seen[0], plain)


def test_calls_with_masks_of_their_own_are_refused_or_kept():
    causal = F.scaled_dot_product_attention(QUERY, QUERY, QUERY, is_causal=True)
    with effattn.replace_sdpa(DECAY):
        with pytest.raises(ValueError, match=r"replace_sdpa: .* is_causal"):
            F.scaled_dot_product_attention(QUERY, QUERY, QUERY, is_causal=True)
        with pytest.raises(ValueError, match="attn_mask"):
            effattn.scaled_dot_product_attention(QUERY, QUERY, QUERY, torch.ones(12, 12, dtype=torch.bool))
        own = F.scaled_dot_product_attention(QUERY, QUERY, QUERY, attn_mask=RETENTION)
    assert torch.equal(own, effattn.retention(QUERY, QUERY, QUERY, RETENTION.log_decay))
    with effattn.replace_sdpa(DECAY, masked="keep"):
        assert torch.equal(F.scaled_dot_product_attention(QUERY, QUERY, QUERY, is_causal=True), causal)
    with pytest.raises(ValueError, match="masked must be one of"):
        effattn.replace_sdpa(DECAY, masked="drop")
    with pytest.raises(TypeError, match="mask_or_fn"):
        effattn.replace_sdpa(None)


def test_a_function_gets_the_options_and_can_call_the_next_one_out():
    seen = []

    def function(query, key, value, **options):
        seen.append(options)
        return F.scaled_dot_product_attention(query, key, value)

    with effattn.replace_sdpa(DECAY), effattn.replace_sdpa(function):
        out = F.scaled_dot_product_attention(QUERY, QUERY, QUERY, None, 0.0, is_causal=True, scale=2.0)
    assert seen == [{"attn_mask": None, "dropout_p": 0.0, "is_causal": True, "scale": 2.0}]
    assert torch.equal(out, F.scaled_dot_product_attention(QUERY, QUERY, QUERY, attn_mask=DECAY))


@pytest.mark.parametrize("patched", [False, True])
def test_multihead_attention_and_patched_layers_are_replaced_too(patched):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(24, 3, batch_first=True)
    x = torch.randn(2, 12, 24)
    effattn.patch(attention, DECAY)
    expected = attention(x, x, x, need_weights=False)[0]
    effattn.unpatch(attention)
    if patched:
        effattn.patch(attention)
    with effattn.replace_sdpa(DECAY):
        torch.testing.assert_close(attention(x, x, x, need_weights=False)[0], expected)


def test_replacement_compiles_inside_and_around():
    expected, plain = (
        call(QUERY) * 0 + F.scaled_dot_product_attention(QUERY, QUERY, QUERY, attn_mask=DECAY),
        call(QUERY),
    )

    def within(x):
        with effattn.replace_sdpa(DECAY):
            return call(x)

    torch.testing.assert_close(torch.compile(within, backend="aot_eager", fullgraph=True)(QUERY), expected)
    around = torch.compile(call, backend="aot_eager", fullgraph=True)
    with effattn.replace_sdpa(DECAY):
        torch.testing.assert_close(around(QUERY), expected)
    torch.testing.assert_close(around(QUERY), plain)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_models_of_timm_are_patched(name):
    timm = pytest.importorskip("timm", exc_type=Exception)
    model, images = timm.create_model(name).eval(), torch.randn(1, 3, 224, 224)
    done = effattn.patch(model, example=images)
    assert len(done.touched) == 12
    assert done.skipped == {}


def test_sixteen_bit_and_meta_models_are_patched():
    model, images = vision().bfloat16(), IMAGES.bfloat16()
    expected = model(images)
    assert len(effattn.patch(model, example=images).touched) == 3
    torch.testing.assert_close(model(images), expected, rtol=0.05, atol=0.05)
    with torch.device("meta"):
        model = vit.VisionTransformer(vit.TINY)
    assert len(effattn.patch(model).touched) == 3


def test_a_default_device_is_no_obstacle():
    expected = effattn.scaled_dot_product_attention(QUERY, QUERY, QUERY, is_causal=True)
    with torch.device("cpu"):  # another torch function mode
        assert torch.equal(effattn.scaled_dot_product_attention(QUERY, QUERY, QUERY, is_causal=True), expected)
        with pytest.raises(NotImplementedError, match="backend='cuda' cannot serve"):
            effattn.scaled_dot_product_attention(QUERY, QUERY, QUERY, backend="cuda")
