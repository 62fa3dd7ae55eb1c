"""The passes of the operators as Triton kernels, under the names that `kernels.torch_backend` has."""

from kernels.backward import input_grad, modulate_grads, reduce_grads
from kernels.forward import apply, modulate, segment_statistics, update_running

__all__ = [
    "apply",
    "input_grad",
    "modulate",
    "modulate_grads",
    "reduce_grads",
    "segment_statistics",
    "update_running",
]
