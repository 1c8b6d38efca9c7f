"""A router between a multiplication expert and a shift expert, balanced by what each costs on this machine."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from .shift_linear import ShiftLinear

NOISE_FLOOR = 1e-2  # published: the least standard deviation of the learned noise
SHORTEST_SAMPLE = 1e-3  # seconds; quicker calls are repeated within one sample


class MixtureOfPrimitives(nn.Module):
    """Each token goes through one of two experts: a multiplication expert or a shift expert.

    With z = router(x), p = softmax(z) and e = argmax(p) for each token, y = p_e * expert_e(x). The gate value p_e scales
    the output, so the router has a gradient from the task. Tokens are grouped by expert: each expert runs once, on its
    tokens only. A group may be empty. How many tokens an expert gets depends on the data, so shapes inside are
    data-dependent: under ``torch.compile`` the router and each expert compile, with a graph break between them.

    In training each call leaves in ``balance_loss`` what is to be added to the loss of the task (see
    :func:`balance_loss`), SCV(importance) + SCV(load), where SCV(a) = var(a) / mean(a)^2 and for expert i

        importance_i = latency_i * sum of p_i over the tokens
        load_i       = latency_i * sum over the tokens of the probability that expert i is chosen, given the noise

    Without noise load_i counts tokens and has no gradient. The loss is least where each expert's share of the tokens is
    in proportion to 1 / latency: the faster expert gets more. ``shares`` holds the shares of the last call.

    Args:
        dim: channels of a token, the router's input.
        experts: (multiplication expert, shift expert), modules that map (tokens, dim) to (tokens, channels), with any
            number of tokens including 0. Default ``nn.Linear(dim, dim)`` and ``ShiftLinear(dim, dim)``.
        latencies: cost of each expert per token, in any unit; see :func:`measure_expert_latency`.
        noise: in training the router's scores get normal noise of this standard deviation, which gives ``load`` its
            gradient: a number (small against the scores, so that the balance holds in evaluation, where there is no
            noise), None for none, or ``"learned"``, where softplus(x @ w_noise) + 0.01 is the deviation and ``w_noise`` a
            (dim, 2) parameter, as published. Learned noise can grow until it does the balancing by itself: look at
            ``shares`` in evaluation.
        gate: ``"probability"`` as above, or ``"straight_through"``: the gate value is 1 in the forward pass and has the
            gradient of p_e. It leaves the output of trained experts as it was.
        device, dtype: of the parameters.

    Shape:
        (..., dim) -> (..., channels), in the experts' dtype.

    Raises:
        TypeError, ValueError: for an argument out of its range, and for an input that does not have ``dim`` channels.

    Source:
        ShiftAddViT, arXiv 2306.06446, section 4.3; ``pvt/fmoe_mlp.py``. What differs: the published top-1 gate value is
        the constant 1, so its router gets no gradient from the task, and its expert outputs are combined through
        exp and log in float32. Its latencies are the constants 6 and 4.

    Example:
        >>> import torch, effattn
        >>> mixture = effattn.nn.MixtureOfPrimitives(16, latencies=(3.0, 2.0))
        >>> mixture(torch.randn(2, 10, 16)).shape
        torch.Size([2, 10, 16])
        >>> mixture.balance_loss.requires_grad, round(mixture.shares.sum().item(), 4)
        (True, 1.0)
    """

    def __init__(
        self,
        dim: int,
        experts: Sequence[nn.Module] | None = None,
        *,
        latencies: Sequence[float] = (1.0, 1.0),
        noise: float | str | None = 0.1,
        gate: str = "probability",
        device=None,
        dtype=None,
    ):
        super().__init__()
        _checks.module_options("MixtureOfPrimitives", device, dtype)
        _checks.integer("MixtureOfPrimitives", "dim", dim, 1)
        if not isinstance(gate, str) or gate not in ("probability", "straight_through"):
            raise ValueError(f'MixtureOfPrimitives: gate must be "probability" or "straight_through", got {gate!r}')
        if isinstance(noise, str):
            if noise != "learned":
                raise ValueError(f'MixtureOfPrimitives: noise must be None, a number or "learned", got {noise!r}')
        elif noise is not None:
            noise = _checks.real("MixtureOfPrimitives", "noise", noise)
            if noise < 0:
                raise ValueError(f"MixtureOfPrimitives: noise must be at least 0, got {noise}")
        like = {"device": device, "dtype": dtype}
        if experts is None:
            experts = nn.Linear(dim, dim, **like), ShiftLinear(dim, dim, **like)
        experts = _two_modules("MixtureOfPrimitives", experts)
        self.dim, self.noise, self.gate = dim, noise, gate
        self.router = nn.Linear(dim, 2, **like)
        if noise == "learned":
            self.w_noise = nn.Parameter(torch.empty(dim, 2, **like))
            self.reset_noise()
        self.experts = nn.ModuleList(experts)
        self.register_buffer("latencies", torch.ones(2, device=device, dtype=torch.float32))
        self.set_latencies(latencies)
        self.balance_loss: Tensor | None = None
        self.shares: Tensor | None = None

    def reset_noise(self) -> None:
        nn.init.kaiming_uniform_(self.w_noise, a=5**0.5)

    def set_latencies(self, latencies: Sequence[float]) -> None:
        """Set what each expert costs, for example to what :func:`measure_expert_latency` returned."""
        pair = (isinstance(latencies, Tensor) and latencies.dim() == 1) or isinstance(latencies, Sequence)
        if isinstance(latencies, (str, bytes)) or not pair or len(latencies) != 2:
            raise TypeError(f"MixtureOfPrimitives: latencies must be two numbers, got {latencies!r}")
        latencies = [value.item() if isinstance(value, Tensor) else value for value in latencies]
        for value in latencies:
            _checks.real("MixtureOfPrimitives", "latencies", value)
            if value <= 0:
                raise ValueError(f"MixtureOfPrimitives: latencies must be greater than 0, got {latencies}")
        with torch.no_grad():
            self.latencies.copy_(torch.tensor(latencies, dtype=torch.float32))

    def forward(self, x: Tensor, *, return_loss: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """(..., dim) -> (..., channels); with ``return_loss`` also the load-balancing loss of this call."""
        _checks.layer_input("MixtureOfPrimitives", "x", x, self.router)
        if x.dim() < 1 or x.shape[-1] != self.dim:
            raise ValueError(
                f"MixtureOfPrimitives: x must have {self.dim} channels (last dimension), got {tuple(x.shape)}"
            )
        if x.is_meta:
            raise NotImplementedError("MixtureOfPrimitives: x is on the meta device, and the values decide the shapes")
        _checks.boolean("MixtureOfPrimitives", "return_loss", return_loss)
        tokens = x.reshape(-1, self.dim)
        clean = _at_least_float32(self.router(tokens))
        deviation = self._deviation(tokens) if self.training else None
        noisy = clean if deviation is None else clean + deviation * torch.randn_like(clean)
        ahead = noisy[:, 1] - noisy[:, 0]
        choice = (ahead > 0).long()
        gate = None  # 1
        if self.gate == "probability":
            gate = ahead.abs().sigmoid()
        elif torch.is_grad_enabled():
            gate = ahead.abs().sigmoid()
            gate = 1 + gate - gate.detach()
        output = self._dispatch(tokens, gate, choice)

        counts = F.one_hot(choice, 2).sum(0)
        self.shares = (counts / max(len(tokens), 1)).detach()
        self.balance_loss = None
        if self.training or return_loss:
            loss = self._balance(clean, noisy, deviation, counts)
            self.balance_loss = loss if self.training else None
        output = output.reshape(*x.shape[:-1], output.shape[-1]) if x.dim() != 2 else output
        return (output, loss) if return_loss else output

    def _deviation(self, tokens: Tensor) -> Tensor | None:
        """Standard deviation of the noise on each score, None for no noise."""
        if self.noise == "learned":
            return _at_least_float32(F.softplus(tokens @ self.w_noise)) + NOISE_FLOOR
        if not self.noise:
            return None
        return torch.full((), float(self.noise), device=tokens.device)

    def _dispatch(self, tokens: Tensor, gate: Tensor | None, choice: Tensor) -> Tensor:
        order = choice.argsort(stable=True)
        place = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
        grouped = torch.empty_like(tokens).index_copy_(0, place, tokens)  # its gradient is a selection
        multiplied = int(len(choice) - choice.sum())
        groups = grouped.split([multiplied, len(order) - multiplied])
        grouped = torch.cat([expert(group) for expert, group in zip(self.experts, groups)])
        if gate is not None:
            grouped = grouped * gate.index_select(0, order).unsqueeze(-1).to(grouped.dtype)
        return torch.empty_like(grouped).index_copy_(0, order, grouped)

    def _balance(self, clean: Tensor, noisy: Tensor, deviation: Tensor | None, counts: Tensor) -> Tensor:
        importance = clean.softmax(-1).sum(0)
        load = counts
        if (
            deviation is not None
        ):  # expert i is chosen where its score, drawn anew, is above the other's as it was drawn
            load = torch.special.ndtr((clean - noisy.flip(-1)) / deviation).sum(0)
        weights = self.latencies.float() / self.latencies.float().sum()
        return _squared_variation(weights * importance) + _squared_variation(weights * load)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # The published module with the deterministic gate calls the router gate.gate.
        for name in ("weight", "bias"):
            published = state_dict.pop(f"{prefix}gate.gate.{name}", None)
            if published is not None:
                state_dict[f"{prefix}router.{name}"] = published
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self):
        return {**self.__dict__, "balance_loss": None}  # it holds the graph of the last call

    def extra_repr(self) -> str:
        return f"dim={self.dim}, noise={self.noise!r}, gate={self.gate!r}"


def _at_least_float32(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _squared_variation(amounts: Tensor) -> Tensor:
    """SCV: variance (of a sample) over the squared mean; 0 where there is nothing."""
    return amounts.var() / (amounts.mean().square() + 1e-10)


def balance_loss(model: nn.Module) -> Tensor:
    """Sum of ``balance_loss`` over every :class:`MixtureOfPrimitives` in ``model``, after a call in training mode.

    Args:
        model: any module.

    Returns:
        A scalar, to be added to the loss of the task with a weight of the user's choice (published: 0.01). 0 where no
        mixture has run in training mode.

    Raises:
        AttributeError: model is no module.

    Source:
        ShiftAddViT, arXiv 2306.06446, section 4.3.

    Example:
        >>> import torch, effattn
        >>> model = torch.nn.Sequential(*(effattn.nn.MixtureOfPrimitives(8) for _ in range(2)))
        >>> loss = model(torch.randn(5, 8)).square().mean() + 0.01 * effattn.nn.balance_loss(model)
        >>> loss.backward()
    """
    losses = [
        m.balance_loss for m in model.modules() if isinstance(m, MixtureOfPrimitives) and m.balance_loss is not None
    ]
    return torch.stack(losses).sum() if losses else torch.zeros(())


def measure_expert_latency(
    experts: MixtureOfPrimitives | Sequence[nn.Module], example_input: Tensor, *, repeats: int = 20
) -> tuple[float, ...]:
    """Median seconds that each expert takes on this machine for ``example_input``.

    The experts take turns, so that whatever disturbs the machine disturbs all alike; a call shorter than a millisecond
    is repeated within one sample; on CUDA the device is synchronised around each sample. The experts run as in
    inference (evaluation mode, no autograd) on a copy that shares no state, and the model is left as it was. Nothing
    is set: hand the result to :meth:`MixtureOfPrimitives.set_latencies`.

    Args:
        experts: a :class:`MixtureOfPrimitives` or any sequence of modules.
        example_input: what the experts are called with, (tokens, dim) as they will see it.
        repeats: samples of each expert.

    Returns:
        Seconds per call, one for each expert.

    Raises:
        TypeError, ValueError: for an argument that is not as described.

    Source:
        ShiftAddViT, arXiv 2306.06446, section 4.3: latencies measured on the target device.

    Example:
        >>> import torch, effattn
        >>> mixture = effattn.nn.MixtureOfPrimitives(16)
        >>> seconds = effattn.nn.measure_expert_latency(mixture, torch.randn(64, 16), repeats=3)
        >>> mixture.set_latencies(seconds)
        >>> len(seconds)
        2
    """
    name = "measure_expert_latency"
    _checks.integer(name, "repeats", repeats, 1)
    if not isinstance(example_input, Tensor):
        raise TypeError(f"{name}: example_input must be a Tensor, got {type(example_input).__name__}")
    modules = experts.experts if isinstance(experts, MixtureOfPrimitives) else experts
    if not isinstance(modules, (Sequence, nn.ModuleList)) or not all(isinstance(m, nn.Module) for m in modules):
        raise TypeError(f"{name}: experts must be a MixtureOfPrimitives or a sequence of modules, got {experts!r}")
    if not len(modules):
        raise ValueError(f"{name}: experts must not be empty")
    copies = [copy.deepcopy(module).eval() for module in modules]

    def sample(module: nn.Module, count: int) -> float:
        _synchronise(example_input)
        begin = time.perf_counter()
        for _ in range(count):
            module(example_input)
        _synchronise(example_input)
        return (time.perf_counter() - begin) / count

    with torch.no_grad():
        for module in copies:
            sample(module, 1)  # the first call packs weights and starts threads
        counts = [max(1, round(SHORTEST_SAMPLE / max(sample(module, 2), 1e-9))) for module in copies]
        samples = [[sample(module, count) for module, count in zip(copies, counts)] for _ in range(repeats)]
    import statistics  # with decimal and fractions behind it

    return tuple(statistics.median(column) for column in zip(*samples))


def _synchronise(tensor: Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)


def _two_modules(op: str, experts) -> list[nn.Module]:
    if not isinstance(experts, (Sequence, nn.ModuleList)) or not all(isinstance(e, nn.Module) for e in experts):
        raise TypeError(f"{op}: experts must be two modules (multiplication, shift), got {experts!r}")
    if len(experts) != 2:
        raise ValueError(f"{op}: experts must be two modules (multiplication, shift), got {len(experts)}")
    return list(experts)


__all__ = ["MixtureOfPrimitives", "balance_loss", "measure_expert_latency"]
