"""Modules with the published parameter names, shapes and initialisation."""

from .gaussian_mixture import GaussianMixtureAttention

__all__ = ["GaussianMixtureAttention"]
