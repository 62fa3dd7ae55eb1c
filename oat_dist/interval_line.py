"""One line of training per log interval, to be read over ssh."""

from collections.abc import Mapping

PHASES = ("data", "attack", "train", "communication")


def interval_line(step: int, total: int, values: Mapping[str, float], timing: Mapping[str, float]) -> str:
    """What happened since the last line.

    Args:
        step: Optimiser steps done.
        total: Of the whole run.
        values: As in metrics.jsonl; what is missing is left out.
        timing: As in timings.jsonl.
    """
    parts = [f"step {step}/{total}"]
    if "epoch" in values:
        parts[0] += f" (epoch {values['epoch'] + 1:.0f})"
    if "loss" in values:
        parts.append(f"loss {values['loss']:.3f}")
    kinds = [kind for kind in ("clean", "robust") if f"accuracy_{kind}" in values]
    if kinds:
        parts.append(" ".join(f"{kind} {values[f'accuracy_{kind}']:.1%}" for kind in kinds))
    if "grad_norm" in values:
        parts.append(f"grad {values['grad_norm']:.3g}")
    if "lr" in values:
        parts.append(f"lr {values['lr']:.3g}")
    if "images_per_s" in timing:
        parts.append(f"{timing['images_per_s']:.0f} images/s")
    shares = [f"{phase} {timing[f'share_{phase}']:.0%}" for phase in PHASES if timing.get(f"share_{phase}")]
    if shares:
        parts.append(" ".join(shares))
    if "peak_memory_mib" in timing:
        parts.append(f"{timing['peak_memory_mib'] / 1024:.1f} GiB")
    return ", ".join(parts)
