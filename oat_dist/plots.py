"""Figures, drawn without a display."""

import pathlib
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from oat_dist.frontier import pareto_front

_STYLES = ("-", "--", ":", "-.")


def draw_frontier(report: dict, path: pathlib.Path) -> None:
    """Draw the curve of a report, one per width: RA over SA, and both over lambda.

    Args:
        report: In the form of frontier.json.
        path: Target; the suffix (.png, .svg, .pdf) gives the format.
    """
    curves = {}
    for point in sorted(report["points"], key=lambda point: point["lam"]):
        curves.setdefault(point.get("width", 1.0), []).append(point)
    attack = report["attack"]
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    curve, over_lambda = figure.subplots(1, 2)

    for at, (width, points) in enumerate(curves.items()):
        of_width, style = (f", width {width:g}", _STYLES[at % len(_STYLES)]) if len(curves) > 1 else ("", "-")
        lam, (sa, ra) = [point["lam"] for point in points], _percent(points)
        curve.plot(sa, ra, marker="o", linestyle=style, color=f"C{at}", label=of_width.removeprefix(", "))
        for x, y, value in zip(sa, ra, lam, strict=True):
            curve.annotate(f"{value:g}", (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8)
        over_lambda.plot(lam, sa, marker="o", linestyle=style, color="tab:green", label=f"SA{of_width}")
        over_lambda.plot(lam, ra, marker="s", linestyle=style, color="tab:red", label=f"RA{of_width}")
    if len(curves) > 1:
        curve.legend(fontsize=8)
    curve.set(xlabel="SA (%)", ylabel="RA (%)", title="one network, labelled by lambda")

    over_lambda.set(xlabel="lambda", ylabel="accuracy (%)", ylim=(0, 100))
    over_lambda.legend(loc="center right", fontsize=None if len(curves) == 1 else 7)
    for axes in (curve, over_lambda):
        axes.grid(alpha=0.3)
    figure.suptitle(
        f"{report['model']}, {report['dataset']} {report['split']} (n = {report['num_examples']}), "
        f"{attack['name']} {attack['norm']} eps {attack['eps'] * 255:g}/255",
        fontsize=10,
    )
    _save(figure, path)


def draw_comparison(comparison: dict, about: dict, path: pathlib.Path) -> None:
    """Draw RA over SA: dedicated networks with seed bars, their Pareto front and frame, and one network's curve.

    Args:
        comparison: From `oat_dist.comparison.compare`.
        about: "model", "dataset", "split", "num_examples" and "attack", as in frontier.json.
        path: Target; the suffix gives the format.
    """
    figure = Figure(figsize=(6.4, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    ours = comparison["conditional"]
    _draw_dedicated(axes, comparison)
    if ours:
        curve = sorted(ours["curve"], key=lambda point: point["lam"])
        axes.plot(*_percent(curve), ".-", color="tab:blue", label=f"one network, {len(curve)} lambdas")
        for point in ours["points"]:
            axes.annotate(f"{point['lam']:g}", (100 * point["sa"], 100 * point["ra"]), fontsize=7,
                          color="tab:blue", textcoords="offset points", xytext=(4, -9))  # fmt: skip
    ratio = f"; frontier ratio {ours['ratio']:.3f}" if ours else ""
    _finish_frontier(figure, axes, about, ratio)
    _save(figure, path)


def draw_search(curves: Sequence[Sequence[dict]], best: int | None, comparison: dict, about: dict,
                path: pathlib.Path) -> None:  # fmt: skip
    """Draw the curves of all trials in grey, the best in colour, and the dedicated frontier.

    Args:
        curves: Points of each trial that was measured.
        best: Which of them is the best, or None.
        comparison: From `oat_dist.comparison.compare`, for the dedicated networks.
        about: "model", "dataset", "split", "num_examples" and "attack".
        path: Target; the suffix gives the format.
    """
    figure = Figure(figsize=(6.4, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for at, curve in enumerate(curves):
        if at != best:
            axes.plot(*_percent(curve), "-", color="0.75", linewidth=0.8, label="trials" if at == 0 else None)
    if best is not None:
        axes.plot(*_percent(curves[best]), "o-", color="tab:blue", label="best trial")
    _draw_dedicated(axes, comparison)
    _finish_frontier(figure, axes, about, f"; {len(curves)} trials")
    _save(figure, path)


def _draw_dedicated(axes: Axes, comparison: dict) -> None:
    """Dedicated points with seed bars, the edge of what they dominate, and the frame of the score."""
    points, frame = comparison["dedicated"]["points"], comparison["frame"]
    bars = [[100 * (point[f"{key}_std"] or 0.0) for point in points] for key in ("sa", "ra")]
    x, y = _percent(points)
    axes.errorbar(x, y, xerr=bars[0], yerr=bars[1], fmt="D", color="tab:red", capsize=2, label="dedicated networks")
    for point in points:
        axes.annotate(f"{point['lam']:g}", (100 * point["sa"], 100 * point["ra"]), fontsize=7, color="tab:red",
                      textcoords="offset points", xytext=(4, 4))  # fmt: skip
    front = pareto_front(points)
    # To the sides of the frame, so that a front of one point is seen too.
    left = {"sa": min(frame["sa_low"], front[0]["sa"]), "ra": front[0]["ra"]}
    below = {"sa": front[-1]["sa"], "ra": min(frame["ra_low"], front[-1]["ra"])}
    front_x, front_y = _percent([left, *front, below])
    axes.step(front_x, front_y, where="pre", color="tab:red", alpha=0.5, label="their Pareto front")
    low, high = (100 * frame["sa_low"], 100 * frame["ra_low"]), (100 * frame["sa_high"], 100 * frame["ra_high"])
    frame_patch = Rectangle(low, high[0] - low[0], high[1] - low[1], fill=False, linestyle=":", edgecolor="0.4")
    axes.add_patch(frame_patch)


def _finish_frontier(figure: Figure, axes: Axes, about: dict, more: str) -> None:
    attack = about["attack"]
    axes.set(xlabel="SA (%)", ylabel=f"RA (%), {attack['name']} {attack['norm']} eps {attack['eps'] * 255:g}/255")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower left")
    title = f"{about['model']}, {about['dataset']} {about['split']} (n = {about['num_examples']}){more}"
    figure.suptitle(title, fontsize=10)


def _percent(points: Sequence[dict]) -> tuple[list[float], list[float]]:
    return [100 * point["sa"] for point in points], [100 * point["ra"] for point in points]


def _save(figure: Figure, path: pathlib.Path) -> None:
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
