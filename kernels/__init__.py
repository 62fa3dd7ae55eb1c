"""Tensor operators of once-for-all adversarial training: FiLM modulation fused with dual batch normalisation.

This package knows tensors only: it imports torch (and triton) and nothing of this project.
"""

from kernels.film_dual_bn import film_dual_bn, modulate
from kernels.reference import film_dual_bn_reference

__all__ = ["film_dual_bn", "film_dual_bn_reference", "modulate"]
