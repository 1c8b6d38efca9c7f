"""What the families' peers share: compiled variants and the unmasked ceiling.

Peers are written as a good user would: scores are updated in place where no gradient needs them, in inference a mask
that does not change is computed once in the dtype that the product wants, and every one is compared with the
specification before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import UNMASKED, Call, Case, Contender, Inputs

NO_FLEX_BACKWARD = "FlexAttention has no backward pass on CPU"


def compiled(function: Callable) -> Callable:
    """torch.compile for this exact shape, as a user who wants speed sets it up.

    mode="max-autotune-no-cudagraphs" was tried: on CPU it keeps the same products and the same times.
    """
    return torch.compile(function, dynamic=False)


def flex(inputs: Inputs, score_mod: Callable[[], Callable] = lambda: None, block_mask=None) -> Call:
    """FlexAttention; ``score_mod()`` makes the function anew at every call, with whatever it has to derive."""
    from torch.nn.attention.flex_attention import flex_attention

    attend = compiled(flex_attention)
    return lambda: attend(inputs.query, inputs.key, inputs.value, score_mod=score_mod(), block_mask=block_mask)


def _unmasked(case: Case, inputs: Inputs, training: bool) -> Call:
    return lambda: F.scaled_dot_product_attention(inputs.query, inputs.key, inputs.value)


unmasked_sdpa = Contender(UNMASKED, _unmasked, exact=False)
"""Stock attention without any structure: the ceiling of whoever computes more than it does."""


def scores(query: Tensor, key: Tensor) -> Tensor:
    """Q K^T without the scale, (B, H, N, N)."""
    return query @ key.transpose(-2, -1)
