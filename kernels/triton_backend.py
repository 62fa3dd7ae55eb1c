"""The passes of the operators as Triton kernels, under the names that `kernels.torch_backend` has."""

from kernels.forward import apply, modulate, segment_statistics, update_running

__all__ = ["apply", "modulate", "segment_statistics", "update_running"]
