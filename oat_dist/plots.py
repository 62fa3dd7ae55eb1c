"""Figures, drawn without a display."""

import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from oat_dist.frontier import pareto_front

_STYLES = ("-", "--", ":", "-.")


def draw_frontier(report: dict, path: pathlib.Path) -> None:
    """Draw the curve of a report, RA over SA and both over lambda, with its confidence intervals; one per width.

    Where the attacker chose among lambdas, also RA for all pairs of lambdas.

    Args:
        report: In the form of frontier.json.
        path: Target; the suffix (.png, .svg, .pdf) gives the format.
    """
    curves: dict[float, list[dict]] = {}
    for point in sorted(report["points"], key=lambda point: point["lam"]):
        curves.setdefault(point.get("width", 1.0), []).append(point)
    attack = report["attack"]
    num_axes = 3 if "matrix" in report else 2
    figure = Figure(figsize=(4.5 * num_axes, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    curve, over_lambda, *rest = figure.subplots(1, num_axes)

    for at, (width, points) in enumerate(curves.items()):
        _draw_curve(curve, over_lambda, points, at=at, name=f"width {width:g}" if len(curves) > 1 else "")
    if len(curves) > 1:
        curve.legend(fontsize=8)
    curve.set(xlabel="SA (%)", ylabel="RA (%)", title="one network, labelled by lambda")
    over_lambda.set(xlabel="lambda", ylabel="accuracy (%)", ylim=(0, 100))
    over_lambda.legend(loc="center right", fontsize=None if len(curves) == 1 else 7)
    for axes in (curve, over_lambda):
        axes.grid(alpha=0.3)
    if rest:
        _draw_matrix(rest[0], report["matrix"])
    figure.suptitle(
        f"{report['model']}, {report['dataset']} {report['split']} (n = {report['num_examples']}), "
        f"{attack['name']} {attack['norm']} eps {attack['eps'] * 255:g}/255",
        fontsize=10,
    )
    _save(figure, path)


def _draw_curve(curve: Axes, over_lambda: Axes, points: Sequence[dict], *, at: int, name: str) -> None:
    """RA over SA, and both over lambda, of one width: number `at` of those that are drawn."""
    suffix, style = (f", {name}", _STYLES[at % len(_STYLES)]) if name else ("", "-")
    lam, (sa, ra) = [point["lam"] for point in points], _percent(points)
    sa_bar, ra_bar = (_interval_bars(points, key) for key in ("sa", "ra"))
    common = {"linestyle": style, "elinewidth": 0.7}
    curve.errorbar(sa, ra, xerr=sa_bar, yerr=ra_bar, marker="o", color=f"C{at}", label=name or None, **common)
    for x, y, value in zip(sa, ra, lam, strict=True):
        curve.annotate(f"{value:g}", (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8)
    over_lambda.errorbar(lam, sa, yerr=sa_bar, marker="o", color="tab:green", label=f"SA{suffix}", **common)
    over_lambda.errorbar(lam, ra, yerr=ra_bar, marker="s", color="tab:red", label=f"RA{suffix}", **common)
    if all("ra_worst" in point for point in points):
        worst = [100 * point["ra_worst"] for point in points]
        label = f"RA, worst lambda to attack through{suffix}"
        bars = _interval_bars(points, "ra_worst")
        over_lambda.errorbar(lam, worst, yerr=bars, fmt="v--", color="tab:red", alpha=0.6, elinewidth=0.7, label=label)


def draw_comparison(comparison: dict, about: dict, path: pathlib.Path) -> None:
    """Draw RA over SA: dedicated networks, their Pareto front and frame, and one network's curve.

    Bars are standard deviations over seeds where there are several, else confidence intervals.

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
        x, y = _percent(ours["points"])
        bars = {"xerr": _bars(ours["points"], "sa"), "yerr": _bars(ours["points"], "ra")}
        axes.errorbar(x, y, **bars, fmt="none", ecolor="tab:blue", elinewidth=0.7)
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
        bars = {"xerr": _interval_bars(curves[best], "sa"), "yerr": _interval_bars(curves[best], "ra")}
        axes.errorbar(*_percent(curves[best]), **bars, fmt="o-", color="tab:blue", elinewidth=0.7, label="best trial")
    _draw_dedicated(axes, comparison)
    _finish_frontier(figure, axes, about, f"; {len(curves)} trials")
    _save(figure, path)


def _draw_matrix(axes: Axes, matrix: dict) -> None:
    """RA by the lambda that answers and the lambda that is attacked through, half an interval's width below each."""
    ra = 100 * np.array(matrix["ra"])
    axes.imshow(ra, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(ra.shape[1]), [f"{lam:g}" for lam in matrix["lambdas"]])
    axes.set_yticks(range(ra.shape[0]), [f"{lam:g}" for lam in matrix["attack_lambdas"]])
    axes.set(xlabel="lambda that answers", ylabel="lambda attacked through", title="RA (%)")
    half = 100 * np.diff(matrix["ra_ci"], axis=-1)[..., 0] / 2
    for (row, column), value in np.ndenumerate(ra):
        text = f"{value:.1f}\n\N{PLUS-MINUS SIGN}{half[row, column]:.1f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=6, color="white" if value < 60 else "black")


def _draw_dedicated(axes: Axes, comparison: dict) -> None:
    """Dedicated points with bars, the edge of what they dominate, and the frame of the score."""
    points, frame = comparison["dedicated"]["points"], comparison["frame"]
    bars = [_bars(points, key) for key in ("sa", "ra")]
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


def _bars(points: Sequence[dict], key: str) -> list[list[float]] | None:
    """Deviations over seeds, in percent, below and above each point; of one seed, its confidence intervals."""
    if any(point.get(f"{key}_std") is None for point in points):
        return _interval_bars(points, key)
    return [[100 * point[f"{key}_std"] for point in points]] * 2


def _interval_bars(points: Sequence[dict], key: str) -> list[list[float]] | None:
    """How far the confidence intervals reach below and above each point, in percent; None where there are none."""
    intervals = [point.get(f"{key}_ci") for point in points]
    if None in intervals:
        return None
    both = list(zip(points, intervals, strict=True))
    # A percentile interval may end a hair short of its point.
    below = [100 * max(0.0, point[key] - low) for point, (low, _) in both]
    return [below, [100 * max(0.0, high - point[key]) for point, (_, high) in both]]


def _save(figure: Figure, path: pathlib.Path) -> None:
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
