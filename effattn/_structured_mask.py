"""What every structured mask is."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from . import ops


class StructuredMask:
    """A mask given by its structure instead of a dense tensor. torch hands SDPA calls that carry one to us.

    A subclass implements ``attend`` (the operator on its structure) and ``dense`` (what it means).
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return ops.scaled_dot_product_attention(*args, **(kwargs or {}))
        return NotImplemented

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, dropout_p: float, scale, backend: str) -> Tensor:
        raise NotImplementedError

    def dense(self) -> Tensor:
        raise NotImplementedError
