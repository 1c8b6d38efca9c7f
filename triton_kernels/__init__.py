"""Triton kernels of effattn, one module per operator family. Installed as effattn.triton_kernels; imported only when a call needs them."""
