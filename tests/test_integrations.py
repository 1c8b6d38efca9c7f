"""Whole models turned into shift-add ones and back; the models are small ones with timm's attribute names, and timm's."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from effattn.integrations import convert_to_shift_add, freeze_shift_add, revert_shift_add
from effattn.nn import FrozenShiftLinear, MixtureOfPrimitives, ShiftAddAttention, ShiftLinear, balance_loss

WIDTH, HEADS, TOKENS = 24, 3, 16


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm, self.norm = nn.Identity(), nn.LayerNorm(self.head_dim), nn.Identity()
        self.gate = None
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.1)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, attn_mask=None, is_causal=False):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask=attn_mask)
        return self.proj_drop(self.proj(self.norm(out.transpose(1, 2).flatten(2))))


class SplitAttention(nn.Module):
    """The published code's names: q and kv."""

    def __init__(self, dim, num_heads, sr_ratio=1):
        super().__init__()
        self.num_heads, self.sr_ratio = num_heads, sr_ratio
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        if sr_ratio > 1:
            self.sr = nn.Conv1d(dim, dim, sr_ratio, sr_ratio)

    def forward(self, x, attn_mask=None, is_causal=False):
        return self.proj(self.q(x) + self.kv(x)[..., : x.shape[-1]])


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.act, self.norm, self.fc2 = (
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Identity(),
            nn.Linear(hidden, dim),
        )

    def forward(self, x):
        return self.fc2(self.norm(self.act(self.fc1(x))))


class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = (
            nn.LayerNorm(WIDTH),
            attention,
            nn.LayerNorm(WIDTH),
            Mlp(WIDTH, 48),
        )

    def forward(self, x, attn_mask=None):
        x = x + self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=False)
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(self, attention=Attention, depth=2):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, 4, 4)
        self.blocks = nn.Sequential(*(Block(attention(WIDTH, HEADS)) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, images):
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return VisionTransformer().eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 16, 16)


def linears(module, kind):
    return {name for name, child in module.named_modules() if type(child) is kind}


EVERYTHING = [
    pytest.param({}, id="linear"),
    pytest.param({"parametrization": "PS", "scale": "channel", "bits": 5}, id="linear PS"),
    pytest.param({"attention": True}, id="attention"),
    pytest.param({"attention": True, "linear": False}, id="attention only"),
    pytest.param({"attention": True, "mlp": "mixture"}, id="mixture"),
    pytest.param({"linear": False, "mlp": "mixture"}, id="mixture only"),
    pytest.param({"mlp": "dense"}, id="dense MLPs"),
]


# ---- what is converted ----


def test_every_linear_layer_but_the_head_is_converted(model):
    before = linears(model, nn.Linear)
    handle = convert_to_shift_add(model)
    assert linears(model, ShiftLinear) == set(handle.converted) == before - {"head"}
    assert linears(model, nn.Linear) == {"head"}
    assert handle.skipped == {"head": "skip"}


def test_the_converted_model_computes_with_rounded_weights(model, images):
    other = copy.deepcopy(model)
    convert_to_shift_add(model, scale="channel", bits=5)
    with torch.no_grad():
        for name in linears(other, nn.Linear) - {"head"}:
            rounded = ShiftLinear.from_linear(other.get_submodule(name), scale="channel", bits=5).to_linear()
            other.get_submodule(name).weight.copy_(rounded.weight)
        torch.testing.assert_close(model(images), other(images), rtol=1e-4, atol=1e-5)


def test_weights_that_are_powers_of_two_give_the_same_model(model, images):
    with torch.no_grad():
        for name in linears(model, nn.Linear):
            weight = model.get_submodule(name).weight
            weight.copy_(weight.sign() * 2.0 ** torch.randint(-6, -2, weight.shape))
        before = model(images)
        convert_to_shift_add(model, parametrization="PS")
        torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-5)


def test_attention_keeps_its_projections_norms_and_dropout(model, images):
    original = copy.deepcopy(model.blocks[0].attn)
    convert_to_shift_add(model, attention=True, linear=False, residual_kernel=5, binarize="sign")
    attention = model.blocks[0].attn
    assert isinstance(attention, ShiftAddAttention)
    assert torch.equal(attention.qkv.weight, original.qkv.weight)
    assert torch.equal(attention.proj.bias, original.proj.bias)
    assert isinstance(attention.k_norm, nn.LayerNorm)
    assert attention.proj_drop.p == 0.1
    assert attention.dconv.weight.shape == (HEADS, 1, 5, 1)
    assert attention.binarize == "sign"
    assert model(images).shape == (2, 5)


def test_attention_and_its_projections_are_converted_together(model, images):
    handle = convert_to_shift_add(model, attention=True)
    assert handle.converted["blocks.1.attn"] == "ShiftAddAttention"
    assert isinstance(model.blocks[1].attn.qkv, ShiftLinear)
    assert model(images).shape == (2, 5)


def test_the_published_names_are_known_and_spatial_reduction_is_left_alone(images):
    model = VisionTransformer(SplitAttention, depth=1)
    convert_to_shift_add(model, attention=True)
    assert not model.blocks[0].attn.fused_qkv
    assert model(images).shape == (2, 5)
    model = VisionTransformer(lambda dim, heads: SplitAttention(dim, heads, sr_ratio=2), depth=1)
    handle = convert_to_shift_add(model, attention=True)
    assert handle.skipped["blocks.0.attn"] == "it has sr"
    assert isinstance(model.blocks[0].attn.q, ShiftLinear)


def test_attention_with_something_of_its_own_is_left_alone(model):
    model.blocks[0].attn.relative_position_bias_table = nn.Parameter(torch.zeros(9, HEADS))
    handle = convert_to_shift_add(model, attention=True, linear=False)
    assert "relative_position_bias_table" in handle.skipped["blocks.0.attn"]
    assert set(handle.converted) == {"blocks.1.attn"}


def test_a_mixture_begins_as_the_mlp_and_its_shift_version(model, images):
    with torch.no_grad():
        before = model.blocks[0].mlp(torch.ones(1, 4, WIDTH))
    handle = convert_to_shift_add(model, linear=False, mlp="mixture")
    mixed = model.blocks[0].mlp
    assert set(handle.converted.values()) == {"MixtureOfPrimitives"}
    with torch.no_grad():
        mixed.router.bias.copy_(torch.tensor([100.0, 0.0]))
    torch.testing.assert_close(mixed(torch.ones(1, 4, WIDTH)), before)  # the gate value is 1
    assert isinstance(mixed.experts[1].fc1, ShiftLinear)
    model.train()(images).sum().backward(retain_graph=True)
    balance_loss(model).backward()
    assert mixed.router.weight.grad.any()


def test_a_layer_with_more_than_an_mlp_is_no_mlp():
    class DecoderLayer(nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attn, self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(8, 4)

    handle = convert_to_shift_add(nn.ModuleList([DecoderLayer()]), mlp="mixture")
    assert set(handle.converted.values()) == {"ShiftLinear"}


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ((), set()),
        ("blocks.0", {f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}),
        (("*.mlp", "head"), {f"blocks.{i}.mlp.fc{j}" for i in (0, 1) for j in (1, 2)} | {"head"}),
        (
            lambda name, module: getattr(module, "out_features", 0) == 3 * WIDTH,
            {f"blocks.{i}.attn.qkv" for i in (0, 1)},
        ),
    ],
    ids=["nothing", "name", "patterns", "function"],
)
def test_what_to_skip_is_said_by_name_pattern_or_function(model, skip, left):
    convert_to_shift_add(model, skip=skip)
    assert linears(model, nn.Linear) == left


def test_the_head_is_what_the_model_says_it_is(model):
    model.get_classifier = lambda: model.blocks[1].mlp.fc2
    del model.head
    convert_to_shift_add(model)
    assert linears(model, nn.Linear) == {"blocks.1.mlp.fc2"}


# ---- what must not be converted ----


def test_tied_weights_stay_tied():
    model = nn.ModuleDict({"embedding": nn.Embedding(7, 4), "hidden": nn.Linear(4, 4), "out": nn.Linear(4, 7)})
    model["out"].weight = model["embedding"].weight
    handle = convert_to_shift_add(model)
    assert handle.converted == {"hidden": "ShiftLinear"}
    assert "shares a parameter" in handle.skipped["out"]


def test_a_layer_used_twice_is_one_layer_afterwards():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    convert_to_shift_add(model)
    assert model[0] is model[2]
    assert isinstance(model[0], ShiftLinear)
    revert_shift_add(model)
    assert model[0] is model[2] is layer


def test_parametrized_layers_are_left_alone():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    handle = convert_to_shift_add(model)
    assert set(handle.converted) == {"1"}


def test_layers_whose_weight_is_read_past_them_are_left_alone():
    """torch's and BEiT's kind of code would go on multiplying by the dense weight."""

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(4, 12, bias=False), nn.Linear(12, 4)
            nn.init.ones_(self.proj.weight)

        def forward(self, x):
            return self.proj(F.linear(x, self.qkv.weight))

    handle = convert_to_shift_add(nn.Sequential(Reads()))
    assert set(handle.converted) == {"0.proj"}
    assert "Reads" in handle.skipped["0.qkv"]


def test_torchs_own_transformer_computes_what_it_did_where_its_fused_path_reads_weights():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        fused = model(x)
        handle = convert_to_shift_add(model)
        assert torch.equal(model(x), fused)
    assert not handle.converted
    assert len(handle.skipped) == 2


# ---- and back ----


@pytest.mark.parametrize("options", EVERYTHING)
def test_reverting_restores_every_module_and_every_bit(model, images, options):
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    parameters = {id(parameter) for parameter in model.parameters()}
    with torch.no_grad():
        before = model(images)
        handle = convert_to_shift_add(model, **options)
        assert handle.converted
        assert not torch.equal(model(images), before)
    new = [parameter for parameter in model.parameters() if id(parameter) not in parameters]
    F.cross_entropy(model.train()(images), torch.tensor([0, 1])).backward()
    torch.optim.SGD(new, lr=0.1).step()
    revert_shift_add(model.eval())
    assert dict(model.named_modules()).keys() == modules.keys()
    assert all(module is modules[name] for name, module in model.named_modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(images), before)


def test_reverting_restores_the_mode_the_model_is_in_now(model):
    convert_to_shift_add(model)
    model.train()
    revert_shift_add(model)
    assert all(module.training for module in model.modules())


def test_a_copy_reverts_on_its_own(model, images):
    before = model(images)
    convert_to_shift_add(model, attention=True, mlp="mixture")
    other = copy.deepcopy(model)
    revert_shift_add(other)
    assert torch.equal(other(images), before)
    assert isinstance(model.blocks[0].attn, ShiftAddAttention)
    revert_shift_add(model)
    assert torch.equal(model(images), before)


def test_the_handle_reverts_too(model, images):
    before = model(images)
    handle = convert_to_shift_add(model)
    assert "converted=8" in repr(handle)
    handle.revert()
    assert torch.equal(model(images), before)
    convert_to_shift_add(model.blocks)  # and what is inside may be converted again


def test_a_module_replaced_since_is_left_as_it_is(model):
    convert_to_shift_add(model)
    mine = model.blocks[0].mlp.fc1 = nn.Linear(WIDTH, 48)
    revert_shift_add(model)
    assert model.blocks[0].mlp.fc1 is mine
    assert isinstance(model.blocks[0].mlp.fc2, nn.Linear)


# ---- state, optimizer, storage ----


@pytest.mark.parametrize("options", EVERYTHING)
def test_the_state_of_one_converted_model_goes_into_another(model, images, options):
    convert_to_shift_add(model, **options)
    other = VisionTransformer().eval()
    convert_to_shift_add(other, **options)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images), model(images))


def test_linear_layers_alone_keep_the_names_of_the_state(model):
    names = set(model.state_dict())
    convert_to_shift_add(model)
    assert set(model.state_dict()) == names


def test_converted_models_pickle(model, images):
    convert_to_shift_add(model, attention=True, mlp="mixture")
    out = model(images)
    other = pickle.loads(pickle.dumps(model))
    assert torch.equal(other(images), out)
    revert_shift_add(other)


def test_parameters_that_were_frozen_stay_frozen(model):
    model.blocks[0].requires_grad_(False)
    convert_to_shift_add(model, parametrization="PS")
    assert not any(parameter.requires_grad for parameter in model.blocks[0].parameters())
    assert all(parameter.requires_grad for parameter in model.blocks[1].parameters())


def test_a_frozen_model_computes_the_same_from_an_eighth_of_the_bytes(model, images):
    convert_to_shift_add(model, attention=True)
    with torch.no_grad():
        before = model(images)
        weights = sum(model.get_submodule(name).weight.nbytes for name in linears(model, ShiftLinear))
        assert freeze_shift_add(model) == 8
        assert torch.equal(model(images), before)
    codes = [module.codes.nbytes for module in model.modules() if isinstance(module, FrozenShiftLinear)]
    assert sum(codes) * 8 == weights
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    model.load_state_dict(torch.load(saved, weights_only=True))
    with pytest.raises(ValueError, match="not one that"):
        revert_shift_add(model)


def test_a_converted_model_trains(model, images):
    convert_to_shift_add(model, attention=True, mlp="mixture", parametrization="PS")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(model(images), torch.tensor([0, 1]))
        losses.append(loss.item())
        optimizer.zero_grad()
        (loss + 0.01 * balance_loss(model)).backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


# ---- errors ----


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"mlp": "moe"}, ValueError, "mlp"),
        ({"bits": 7}, ValueError, "bits"),
        ({"linear": 1}, TypeError, "linear"),
        ({"attention": None}, TypeError, "attention"),
        ({"attention": True, "residual_kernel": 2}, ValueError, "residual_kernel"),
        ({"binarize": "x"}, ValueError, "binarize"),
        ({"skip": "heads"}, ValueError, "heads"),
        ({"skip": 3}, TypeError, "skip"),
        ({"activation": "fixed16.16", "scale": "channel"}, ValueError, "scale"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_changed(model, options, error, names):
    modules = dict(model.named_modules())
    with pytest.raises(error, match=names):
        convert_to_shift_add(model, **options)
    assert dict(model.named_modules()) == modules


def test_wrong_models_are_refused(model):
    with pytest.raises(TypeError, match="model"):
        convert_to_shift_add([model])
    with pytest.raises(ValueError, match="from_linear"):
        convert_to_shift_add(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="not one that"):
        revert_shift_add(model)
    convert_to_shift_add(model)
    with pytest.raises(ValueError, match="already"):
        convert_to_shift_add(model)
    with pytest.raises(TypeError, match="model"):
        freeze_shift_add(3)
    with pytest.raises(ValueError, match="freeze"):
        freeze_shift_add(ShiftLinear(3, 3))


# ---- the real ones ----


@pytest.mark.parametrize(
    ("name", "attentions"), [("vit_tiny_patch16_224", True), ("swin_tiny_patch4_window7_224", False)]
)
def test_timm_models_convert_and_come_back(name, attentions):
    timm = pytest.importorskip("timm", reason="timm is not installed", exc_type=ImportError)
    torch.manual_seed(0)
    small = {"depth": 2} if attentions else {"depths": (1, 1), "embed_dim": 24, "num_heads": (3, 6)}
    model = timm.create_model(name, num_classes=5, **small).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        before = model(images)
        handle = convert_to_shift_add(model, attention=True, mlp="mixture")
        assert any(isinstance(module, ShiftAddAttention) for module in model.modules()) == attentions
        assert any(isinstance(module, MixtureOfPrimitives) for module in model.modules())
        assert any(name.startswith("head") for name in handle.skipped)
        assert model(images).shape == before.shape
        revert_shift_add(model)
        assert torch.equal(model(images), before)
