"""Training of heads: how long an epoch takes, what the haversine loss buys, what coarser cells cost.

    python scripts/bench_train.py
    python scripts/bench_train.py --only speed    # or loss, or sweep
    python scripts/bench_train.py --quick         # tiny: shows that it runs, judges nothing

speed   79,144 places x 4 views x 1,024 features, 1,898 cells, weighted CE + haversine, batches of 1,024: the views are
        fused once, timed; then epochs as `geoloc train` runs them (order, dropout, loss, AdamW, a look at 1,000 places
        of val), each beside the matrix products of an epoch alone (y W^T, G^T y, G W; 6 N D C = 0.92 TFLOP), taken in
        turns; medians of wall time. In bf16 too, where the processor has it.
loss    20,000 places, H3 of resolution 3, label smoothing 0.1, 5 seeds: weighted CE against weighted CE + 0.05 x
        haversine on test, by the best cell's centroid and by the posterior mean; and the second loss in bf16. One call
        of `geoloc train --sweep`; the means over the seeds are compared.
sweep   the same places, k-means of 500, 1,000, 2,000 and 4,000 cells, both losses, one seed: does top-1 rise and
        balscore fall with coarser cells, as the published heads' do?

The features are made here (scripts/synthetic_heads.py). Tables go to stderr.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import Bar, bar, report, unjudged
from synthetic_heads import FIELD, World, cells_around, write_world

from geoloc_batch.api import train_head
from geoloc_batch.geo.cells.h3 import build_h3
from geoloc_batch.geo.cells.kmeans import build_kmeans
from geoloc_batch.model.arithmetic import auto_precision, fix_summation_order
from geoloc_batch.train.config import FitConfig, LossConfig, TrainConfig
from geoloc_batch.train.features import load_features
from geoloc_batch.train.fit import State, Task, first_head, fit
from geoloc_batch.train.places import read_places

PLAIN, WITH_KM = "weighted-ce", "weighted-ce+haversine"
LAM = 0.05
BATCH = 1024
POSITIONS = ("top1", "mean")
Heads = list[dict[str, Any]]


def main() -> int:
    """Measure what was asked for, print; exit 0 when every bar is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("speed", "loss", "sweep"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--scratch", type=Path, help="folder for the embeddings, 0.7 GB; removed at the end")
    options = parser.parse_args()
    fix_summation_order()
    parts: dict[str, Callable[..., tuple[list[Bar], dict[str, Any]]]] = {"speed": speed, "loss": loss, "sweep": sweep}
    bars: list[Bar] = []
    tables: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for name, measure in parts.items():
            if options.only in (None, name):
                measured, told = measure(Path(scratch) / name, is_quick=options.quick)
                bars += measured
                tables |= told
    return report("train", unjudged(bars) if options.quick else bars, ("torch", "numpy"), **tables)


def speed(folder: Path, *, is_quick: bool) -> tuple[list[Bar], dict[str, Any]]:
    """Seconds of an epoch over those of its products."""
    num_places, dim, num_cells, turns = (3000, 64, 90, 2) if is_quick else (79_144, 1024, 1898, 5)
    world = World(num_places=num_places + 1000, dim=dim)
    write_world(folder, world)
    start = time.perf_counter()
    places = read_places(TrainConfig(embeddings=(str(folder),), cells=("-",), out="-", group_by=FIELD))
    features = load_features(places, "fused", torch.device("cpu"), hold="memory", scratch=folder)
    fusing = time.perf_counter() - start
    told(f"{num_places + 1000} places x {world.num_views} views x {dim}: read and fused once in {fusing:.1f} s")
    partition = cells_around(places.point_deg_L2, num_cells)
    cell_L = partition.assign(*places.point_deg_L2.T)
    split_L = np.repeat(np.array([0, 1, 2], dtype=np.int8), [num_places, 999, 1])
    task = Task(
        features=features, point_deg_L2=places.point_deg_L2, cell_L=cell_L, split_L=split_L, partition=partition
    )
    precisions = ["fp32"] + (["bf16"] if auto_precision(features.device) == "bf16" else [])
    seconds = {precision: epochs_and_products(task, precision, turns) for precision in precisions}
    epoch, products = seconds["fp32"]
    bf16 = seconds.get("bf16")
    return [
        bar("epoch / its matrix products alone, fp32", round(epoch / products, 3), "ratio", 1.3, is_lower=True),
        bar("epoch, fp32", round(epoch, 2), "s", is_lower=True),
        bar("epoch, bf16 / fp32", None if bf16 is None else round(bf16[0] / epoch, 3), "ratio", is_lower=True),
        bar("reading the views and fusing them, once", round(fusing, 2), "s", is_lower=True),
    ], {}


def epochs_and_products(task: Task, precision: str, turns: int) -> tuple[float, float]:
    """(median seconds of an epoch, of its products in fp32), taken in turns; the first turn warms up."""
    config = FitConfig(epochs=turns + 1, patience=turns + 1, batch_size=BATCH)
    times: list[tuple[float, float]] = []
    begun = time.perf_counter()

    def after_epoch(state: State) -> None:
        nonlocal begun
        whole = time.perf_counter() - begun
        alone = products_alone(task)
        times.append((whole, alone))
        told(f"{precision}: epoch {whole:.2f} s, products in fp32 {alone:.2f} s, ratio {whole / alone:.3f}")
        begun = time.perf_counter()

    head = State(head=first_head(task, is_standard=True))
    begun = time.perf_counter()
    fit(task, config, LossConfig(kind=WITH_KM, lam=LAM), head, seed=0, precision=precision, after_epoch=after_epoch)
    whole, alone = (statistics.median(column) for column in zip(*times[1:], strict=True))
    return whole, alone


def products_alone(task: Task) -> float:
    """Seconds of an epoch's matrix products, into memory that is used again."""
    num_cells, dim = len(task.partition), task.features.dim
    num_train = len(task.places_of("train"))
    sizes = [len(part) for part in np.array_split(np.arange(num_train), -(-num_train // BATCH))]
    feature_BD, grad_BC = torch.randn(max(sizes), dim), torch.randn(max(sizes), num_cells)
    weight_CD, out_BC, out_CD = torch.randn(num_cells, dim), torch.empty_like(grad_BC), torch.empty(num_cells, dim)
    out_BD = torch.empty_like(feature_BD)
    start = time.perf_counter()
    for size in sizes:
        torch.mm(feature_BD[:size], weight_CD.T, out=out_BC[:size])
        torch.mm(grad_BC[:size].T, feature_BD[:size], out=out_CD)
        torch.mm(grad_BC[:size], weight_CD, out=out_BD[:size])
    return time.perf_counter() - start


def loss(folder: Path, *, is_quick: bool) -> tuple[list[Bar], dict[str, Any]]:
    """Weighted CE against weighted CE + haversine, and fp32 against bf16."""
    world, seeds, flags = small_world(is_quick, range(2 if is_quick else 5))
    write_world(folder / "emb", world)
    partition, _ = build_h3(world.points_deg(), 2 if is_quick else 3)
    partition.save(folder / "h3.json")
    flags |= {"cells": [folder / "h3.json"], "seed": seeds, "lam": [LAM], "sweep": True}
    fp32 = heads_of(folder, "fp32", flags | {"loss": [PLAIN, WITH_KM], "precision": "fp32"})
    plain, with_km = ([head for head in fp32 if head["loss"]["kind"] == kind] for kind in (PLAIN, WITH_KM))
    bf16 = None
    if auto_precision(torch.device("cpu")) == "bf16":
        bf16 = heads_of(folder, "bf16", flags | {"loss": [WITH_KM], "precision": "bf16"})
    rows = [(PLAIN, plain), (WITH_KM, with_km)] + ([(f"{WITH_KM}, bf16", bf16)] if bf16 else [])
    told(f"{len(partition)} cells, {len(seeds)} seeds, means over them on test (their standard deviations)")
    for name, heads in rows:
        told(f"  {name:<28} " + "   ".join(shown(heads, position) for position in POSITIONS))
    bars = []
    for figure in ("median_km", "mean_km"):
        name = f"{figure}, posterior mean: with haversine / without"
        bars.append(bar(name, ratio(with_km, plain, "mean", figure), "ratio", 0.6, is_lower=True))
    for figure in ("median_km", "mean_km"):
        name = f"{figure}, best cell: with haversine / without, or its inverse"
        bars.append(bar(name, apart(with_km, plain, figure), "ratio", 1.05, is_lower=True))
    name = "balscore, bf16 against fp32: their distance in its standard error"
    bars.append(bar(name, in_errors(bf16, with_km), "errors", 2.0, is_lower=True))
    return bars, {"loss": {name: {where: summary(heads, where) for where in POSITIONS} for name, heads in rows}}


def sweep(folder: Path, *, is_quick: bool) -> tuple[list[Bar], dict[str, Any]]:
    """Coarse to fine cells: whether top-1 falls and balscore rises."""
    world, _, flags = small_world(is_quick, range(1))
    write_world(folder / "emb", world)
    cells = []
    for k in (20, 60) if is_quick else (500, 1000, 2000, 4000):
        cells.append(folder / f"kmeans{k}.json")
        # 20,000 places fill 4,000 cells with 5 each: fewer than 3 are merged.
        build_kmeans(world.points_deg(), k, min_points=3)[0].save(cells[-1])
    heads = heads_of(folder, "sweep", flags | {"cells": cells, "loss": [PLAIN, WITH_KM], "lam": [LAM], "sweep": True})
    heads.sort(key=lambda head: (head["loss"]["kind"], head["num_cells"]))
    told("cells  loss                     top-1    balscore of the best cell   of the posterior mean")
    rows = []
    for head in heads:
        test = head["metrics"]["test"]
        row = [head["num_cells"], head["loss"]["kind"], test["top1"]["top_1"]]
        row += [test[position]["balscore"] for position in POSITIONS]
        rows.append([value if isinstance(value, str) else round(value, 1) for value in row])
        told("{:5}  {:<22} {:7.1f}  {:20.1f}  {:20.1f}".format(*row))
    names = ["cells", "loss", "top_1", "top1_balscore", "mean_balscore"]
    return [], {"sweep": [dict(zip(names, row, strict=True)) for row in rows]}


def small_world(is_quick: bool, seeds: range) -> tuple[World, list[int], dict[str, Any]]:
    """The places of both comparisons, seeds, and how their heads are trained."""
    world = World(num_places=1200 if is_quick else 20_000)
    if is_quick:
        world = replace(world, dim=32, num_views=2)
    flags: dict[str, Any] = {"group_by": FIELD, "label_smoothing": 0.1}
    if is_quick:
        flags["epochs"] = 2
    return world, list(seeds), flags


def heads_of(folder: Path, name: str, flags: dict[str, Any]) -> Heads:
    """The head.json of each head of a sweep."""
    start = time.perf_counter()
    trained = train_head(folder / "emb", out=folder / name, **flags)
    if trained.exit_code:
        raise SystemExit(trained.exit_code)
    told(f"{name}: {len(trained.heads)} heads in {time.perf_counter() - start:.0f} s")
    return [dict(head) for _, head in trained.heads]


def values(heads: Heads, position: str, figure: str) -> list[float]:
    """[seeds] of a figure on test."""
    return [float(head["metrics"]["test"][position][figure]) for head in heads]


def ratio(ours: Heads, theirs: Heads, position: str, figure: str) -> float:
    """Of the means over the seeds."""
    means = [statistics.fmean(values(heads, position, figure)) for heads in (ours, theirs)]
    return round(means[0] / means[1], 3)


def apart(ours: Heads, theirs: Heads, figure: str) -> float:
    """By which factor the best cell's figures differ, whichever is the greater."""
    found = ratio(ours, theirs, "top1", figure)
    return max(found, round(1 / found, 3))


def in_errors(bf16: Heads | None, fp32: Heads) -> float | None:
    """How far the means over seeds lie apart, in standard errors of their difference."""
    if bf16 is None:
        return None
    pairs = [values(heads, "mean", "balscore") for heads in (bf16, fp32)]
    error = (sum(statistics.variance(column) / len(column) for column in pairs)) ** 0.5
    return round(abs(statistics.fmean(pairs[0]) - statistics.fmean(pairs[1])) / max(error, 1e-9), 2)


def summary(heads: Heads, position: str) -> dict[str, list[float]]:
    """[mean, standard deviation] over the seeds of each figure on test."""
    found = {}
    for figure in ("top_1", "median_km", "mean_km", "balscore"):
        column = values(heads, position, figure)
        found[figure] = [round(statistics.fmean(column), 2), round(statistics.stdev(column), 2)]
    return found


def shown(heads: Heads, position: str) -> str:
    """One cell of the table."""
    found = summary(heads, position)
    figures = (("median_km", "median", "km"), ("mean_km", "mean", "km"), ("balscore", "balscore", ""))
    told_figures = [f"{name} {found[key][0]:.0f} ({found[key][1]:.0f}) {unit}".strip() for key, name, unit in figures]
    top_1 = f"top-1 {found['top_1'][0]:.1f} %, " if position == "top1" else ""
    return f"{'best cell' if position == 'top1' else 'posterior mean'}: {top_1}{', '.join(told_figures)}"


def told(line: str) -> None:
    """To stderr, at once."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
