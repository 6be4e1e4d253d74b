"""The demo's figure: true against predicted places on a map, and the share of places within a distance.

Shape letters: N places.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def draw_figure(path: Path, truth_deg_N2: Floats, found_deg_N2: Floats, error_km_N: Floats, guess_km_N: Floats) -> None:
    """Write a PNG.

    Args:
        path: of the PNG.
        truth_deg_N2: [N, 2] where the places are, (lat, lon) in degrees.
        found_deg_N2: [N, 2] where they were predicted.
        error_km_N: [N] between the two.
        guess_km_N: [N] error of always naming the commonest cell.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (chart, curve) = pyplot.subplots(1, 2, figsize=(14, 6.5), width_ratios=[1.15, 1], layout="constrained")
    pairs = np.stack([truth_deg_N2, found_deg_N2], axis=1)
    for (lats, lons), error in zip(pairs.transpose(0, 2, 1), error_km_N, strict=True):
        chart.plot(lons, lats, color=pyplot.colormaps["viridis_r"](min(error / 1500, 1.0)), linewidth=0.5, alpha=0.5)
    chart.scatter(*truth_deg_N2.T[::-1], s=7, color="black", label="true place", zorder=3)
    shown = chart.scatter(
        *found_deg_N2.T[::-1], s=9, c=error_km_N, cmap="viridis_r", vmax=1500, label="predicted place", zorder=4
    )
    figure.colorbar(shown, ax=chart, label="error (km)", extend="max")
    chart.set(xlabel="longitude (degrees)", ylabel="latitude (degrees)", title="Where the test places are and were put")
    chart.set_aspect(1 / np.cos(np.radians(52)))
    chart.legend(loc="upper left")
    share = np.arange(1, len(error_km_N) + 1) / len(error_km_N)
    for errors, label in ((error_km_N, "head on the demo encoder"), (guess_km_N, "always the commonest cell")):
        curve.plot(np.sort(errors), share, label=f"{label}: median {np.median(errors):.0f} km")
    curve.set(xlim=(0, 3000), ylim=(0, 1), xlabel="error (km)", ylabel="share of places", title="Within a distance")
    curve.grid(alpha=0.3)
    curve.legend(loc="lower right")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
