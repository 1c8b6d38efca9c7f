"""The launchers of the shift-add family: linear layers with power-of-two weights, and attention with binary queries and keys."""

from .shift_add_attention import shift_add_attention_bwd as shift_add_attention_bwd
from .shift_add_attention import shift_add_attention_fwd as shift_add_attention_fwd
from .shift_add_linear import shift_linear_bwd as shift_linear_bwd
from .shift_add_linear import shift_linear_fwd as shift_linear_fwd
