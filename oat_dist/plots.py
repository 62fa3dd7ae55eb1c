"""Figures, drawn without a display."""

import pathlib

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def draw_frontier(report: dict, path: pathlib.Path) -> None:
    """Draw the curve of a report: RA over SA, and both over lambda.

    Args:
        report: In the form of frontier.json.
        path: Target; the suffix (.png, .svg, .pdf) gives the format.
    """
    points = sorted(report["points"], key=lambda point: point["lam"])
    lam = [p["lam"] for p in points]
    sa, ra = ([100 * p[key] for p in points] for key in ("sa", "ra"))
    attack = report["attack"]
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    curve, over_lambda = figure.subplots(1, 2)

    curve.plot(sa, ra, "o-", color="tab:blue")
    for x, y, value in zip(sa, ra, lam, strict=True):
        curve.annotate(f"{value:g}", (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8)
    curve.set(xlabel="SA (%)", ylabel="RA (%)", title="one network, labelled by lambda")

    over_lambda.plot(lam, sa, "o-", color="tab:green", label="SA")
    over_lambda.plot(lam, ra, "s-", color="tab:red", label="RA")
    over_lambda.set(xlabel="lambda", ylabel="accuracy (%)", ylim=(0, 100))
    over_lambda.legend(loc="center right")
    for axes in (curve, over_lambda):
        axes.grid(alpha=0.3)
    figure.suptitle(
        f"{report['model']}, {report['dataset']} {report['split']} (n = {report['num_examples']}), "
        f"{attack['name']} {attack['norm']} eps {attack['eps'] * 255:g}/255",
        fontsize=10,
    )
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
