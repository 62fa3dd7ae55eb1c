"""Doing the same work again and again as one recorded CUDA graph, where it can be, else as ever.

A step of training launches thousands of small kernels for its attack, and a fast GPU waits for the host between them.
A CUDA graph is recorded once and launched as one. It reads and writes fixed memory, so inputs are copied into static
tensors before, and the result is copied out after: nothing that a caller holds is overwritten by the next call.
"""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

Recorder = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""From a function that reads static tensors to one that does its work again and gives the result, in reused memory."""


class CudaRecorder:
    """Records CUDA graphs on a stream of its own; all share one memory pool, since none runs beside another."""

    # The first run compiles kernels and makes library handles and workspaces, which a recording cannot; the second
    # finds them all made.
    _WARM_UP = 2

    def __init__(self, device: torch.device) -> None:
        """Record nothing yet.

        Args:
            device: A GPU.
        """
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Warm up and record; the host waits for the device, this once."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        # The outer block gives the stream back if recording fails: torch.cuda.graph then does not.
        with torch.cuda.stream(self._stream):
            for _ in range(self._WARM_UP):
                run()
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads (NCCL's watchdog, the loader) may go on with their own work meanwhile.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                output = run()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


class GraphReplay:
    """Runs one function of tensors by its recording, one recording per combination of shapes.

    The function must depend on its tensors alone, or on what stays where it is in memory (buffers of a network), and
    must not wait for the device.
    """

    def __init__(self, recorder: Recorder, *, name: str, most_shapes: int = 8) -> None:
        """Record nothing yet.

        Args:
            recorder: How a function is recorded.
            name: What the function is, for the log.
            most_shapes: Recordings that are kept; with further shapes the function runs without one.
        """
        self._recorder, self._name, self._most_shapes = recorder, name, most_shapes
        self._recordings: dict[tuple, tuple[list[Tensor], Callable[[], Tensor]]] = {}
        self._is_off = False
        self._said: set[str] = set()

    def __call__(self, function: Callable[[Sequence[Tensor]], Tensor], tensors: Sequence[Tensor]) -> Tensor:
        """`function(tensors)`, bit for bit.

        Args:
            function: Always the same function; it is called when shapes are new, or nothing can be recorded.
            tensors: Its input, without a graph.

        Returns:
            The result, in memory of its own.
        """
        key = tuple((t.shape, t.dtype, t.device) for t in tensors)
        if key not in self._recordings and not self._is_off:
            if len(self._recordings) < self._most_shapes:
                self._record(key, function, tensors)
            else:
                self._say(f"shapes change from step to step (more than {self._most_shapes}); new ones run without it")
        if key not in self._recordings:
            return function(tensors)
        static, replay = self._recordings[key]
        _copy(static, tensors)
        return replay().clone()

    def _record(self, key: tuple, function: Callable[[Sequence[Tensor]], Tensor], tensors: Sequence[Tensor]) -> None:
        static = [torch.empty_like(t) for t in tensors]
        _copy(static, tensors)
        try:
            self._recordings[key] = static, self._recorder(lambda: function(static))
        except RuntimeError as error:  # CUDA's errors; one of the function's own comes again without a recording
            self._is_off = True
            self._say(f"recording failed: {str(error).partition(chr(10))[0]}")

    def _say(self, reason: str) -> None:
        """Log a reason once."""
        if reason not in self._said:
            self._said.add(reason)
            _log.warning("engine.cuda_graph: the %s runs without a CUDA graph: %s", self._name, reason)


def graph_replay(is_wanted: bool, device: torch.device, *, name: str, most_shapes: int = 8) -> GraphReplay | None:
    """What runs a function as a CUDA graph, or None where there can be none.

    Args:
        is_wanted: `engine.cuda_graph`.
        device: Where the function computes.
        name: What the function is, for the log.
        most_shapes: Recordings that are kept.
    """
    if is_wanted and device.type == "cuda":
        return GraphReplay(CudaRecorder(device), name=name, most_shapes=most_shapes)
    if is_wanted:
        _log.info("engine.cuda_graph: the %s runs without a CUDA graph: no GPU", name)
    return None


@torch.no_grad()
def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy all tensors, those of one dtype in one operation."""
    by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        pair = by_dtype.setdefault(target.dtype, ([], []))
        pair[0].append(target)
        pair[1].append(source)
    for into, values in by_dtype.values():
        torch._foreach_copy_(into, values)
