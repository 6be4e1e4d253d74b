"""Splits of places into train, val and test that do not leak: made, read from a file, checked. numpy and h3.

Rows with the same coordinates stand on one spot, and rows may be labelled to stay together: what is shared out are
units, the connected parts of the graph of spots and labels, and all rows of a unit go the same way. A split depends on
the set of spots, the labels and the seed, on nothing else.

Shape letters: N rows, K distinct spots, U units, G groups (cells or blocks).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from geoloc_batch.errors import ConfigError, SplitError
from geoloc_batch.geo.points import check_points
from geoloc_batch.geo.shapes.h3 import h3_indexes
from geoloc_batch.geo.sphere import EARTH_RADIUS_KM, haversine_km
from geoloc_batch.train.spots import distinct_spots, nearest, units_of

SPLITS = ("train", "val", "test")
"""By their codes: 0, 1, 2."""
LEFT_OUT = -1
"""The code of a row that belongs to no split."""
BUFFER_SHARE = 0.5
"""The buffer where none is given, as a share of --block-km: it costs an eighth of a dense set, a whole one a third."""

# Rows lie where their key says, and points where their rounded degrees do: a metre on top covers both.
_SLACK_KM = 1e-3

Codes = NDArray[np.int8]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def split_places(
    point_deg_N2: ArrayLike,
    cell_N: ArrayLike | None = None,
    *,
    together_N: ArrayLike | None = None,
    shares: tuple[float, float, float] = (0.8, 0.1, 0.1),
    block_km: float | None = None,
    buffer_km: float | None = None,
    seed: int = 0,
) -> Codes:
    """Share places out over train, val and test.

    Without `block_km` each cell's places are shared out by the shares, remainders carried from cell to cell; a place of
    every cell goes to train. With it whole H3 cells go the same way, of the finest resolution whose mean edge is at
    least `block_km`, so that every block, the smallest pentagon too, is wider than that; cells are not looked at then,
    and places of train that lie within the buffer of a place of val or test are left out.

    Args:
        point_deg_N2: [N, 2] (lat, lon) in degrees.
        cell_N: [N] the cell of each, any whole numbers; None for one cell. Of a unit whose rows differ the lowest.
        together_N: [N] labels, any whole numbers: rows of one label are views of one place. They stay together, with
            every label that shares coordinates with one of them, and so on; the block of them all is that of the label
            whose first row has the lowest coordinates. None where coordinates alone decide.
        shares: of train, val and test; each above 0, together 1.
        block_km: how wide a block is at least, kilometres.
        buffer_km: no row of train is nearer than this to one of val or test; default `block_km` / 2, 0 for none.
        seed: of the draw.

    Returns:
        [N] int8: 0 train, 1 val, 2 test, -1 left out.

    Raises:
        ConfigError: shares, `block_km` or `buffer_km` are out of range.
        PartitionError: a point is NaN or no place on Earth.
        SplitError: one of the three would be empty.
    """
    if len(shares) != 3 or not all(share > 0 for share in shares) or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise ConfigError(f"--shares must be three numbers above 0 that add up to 1, got {shares}")
    buffer_km = kept_buffer_km(block_km, buffer_km)
    points = np.asarray(point_deg_N2, dtype=np.float64).reshape(-1, 2)
    spot_K2, spot_N = distinct_spots(check_points(points[:, 0], points[:, 1]))
    unit_K, chief_U = units_of(spot_N, together_N, len(spot_K2))
    # Drawn for the sorted units, so that the order of the rows and their number are of no account.
    rng = np.random.default_rng([seed, 7])
    draw_U = rng.random(len(chief_U))
    if block_km is None:
        code_U = _share_by_cell(_lowest(cell_N, unit_K[spot_N], len(chief_U)), draw_U, shares, rng)
    else:
        _, block_U = np.unique(h3_indexes(spot_K2[chief_U], block_resolution(block_km)), return_inverse=True)
        code_U = _share_blocks(block_U, shares, rng)
        if buffer_km:
            code_U[unit_K[_near_held_out(spot_K2, code_U[unit_K], buffer_km + _SLACK_KM)]] = LEFT_OUT
    code_N = code_U[unit_K[spot_N]]
    _check_filled(code_N, _too_few(len(chief_U), block_km, buffer_km))
    return code_N


def check_leaks(
    point_deg_N2: ArrayLike,
    split_N: ArrayLike,
    *,
    block_km: float | None = None,
    buffer_km: float | None = None,
    source: str = "the split",
    name_of: Callable[[int], str] = "row {}".format,
) -> None:
    """Refuse a split that leaks.

    Args:
        point_deg_N2: [N, 2] (lat, lon) in degrees. A place with several views has a row for each of their points.
        split_N: [N] codes: 0 train, 1 val, 2 test, -1 in none of them.
        block_km: with it no row of train may be nearer than the buffer to one of val or test.
        buffer_km: the buffer; default `block_km` / 2, as `split_places` keeps it.
        source: what messages call the split.
        name_of: what messages call a row, by its number.

    Raises:
        ConfigError: `block_km` or `buffer_km` are out of range.
        PartitionError: a point is NaN or no place on Earth.
        SplitError: a code is none of these, the same coordinates stand in two splits, a row of train is too near, or a
            split is empty.
    """
    buffer_km = kept_buffer_km(block_km, buffer_km)
    points = np.asarray(point_deg_N2, dtype=np.float64).reshape(-1, 2)
    code_N = np.asarray(split_N)
    if code_N.shape != (len(points),):
        raise SplitError(f"{source}: {len(points)} places need so many codes, got the shape {code_N.shape}")
    unknown = np.flatnonzero(~np.isin(code_N, (LEFT_OUT, *range(len(SPLITS)))))
    if len(unknown):
        raise SplitError(
            f"{source}: {name_of(int(unknown[0]))} has the code {code_N[unknown[0]]} ({len(unknown)} such rows); codes "
            f"are 0 train, 1 val, 2 test, -1 left out"
        )
    code_N = code_N.astype(np.int8)
    spot_K2, spot_N = distinct_spots(check_points(points[:, 0], points[:, 1]))
    _check_shared_spots(code_N, spot_K2, spot_N, source, name_of)
    _check_filled(code_N, f"{source}: give each of them rows")
    if buffer_km:
        _check_distance(points, code_N, buffer_km, source, name_of)


def block_resolution(block_km: float) -> int:
    """The finest H3 resolution whose mean edge is at least `block_km`.

    Raises:
        ConfigError: no resolution has so long an edge, or `block_km` is not above 0.
    """
    import h3.api.basic_int as h3

    edges_km = [h3.average_hexagon_edge_length(res, unit="km") for res in range(16)]
    if not 0 < block_km <= edges_km[0]:
        raise ConfigError(f"--block-km must be above 0 and at most {edges_km[0]:.0f}, got {block_km}")
    return max(res for res in range(16) if edges_km[res] >= block_km)


def kept_buffer_km(block_km: float | None, buffer_km: float | None) -> float:
    """The buffer that is kept where these two are given; 0 for none.

    Raises:
        ConfigError: one of them is out of range, or a buffer is given without blocks.
    """
    if block_km is None:
        if buffer_km:
            raise ConfigError(f"--buffer-km {buffer_km} keeps blocks apart; give --block-km too")
        return 0.0
    block_resolution(block_km)
    if buffer_km is None:
        return BUFFER_SHARE * block_km
    if not 0 <= buffer_km <= math.pi * EARTH_RADIUS_KM:
        raise ConfigError(f"--buffer-km must be from 0 to {math.pi * EARTH_RADIUS_KM:.0f}, got {buffer_km}")
    return buffer_km


def _lowest(cell_N: ArrayLike | None, unit_N: Ints, num_units: int) -> Ints:
    """[U] the lowest cell of each unit's rows, numbered from 0 without gaps."""
    if cell_N is None:
        return np.zeros(num_units, dtype=np.int64)
    cells = np.asarray(cell_N, dtype=np.int64)
    assert cells.shape == unit_N.shape, f"{len(unit_N)} rows, cells of the shape {cells.shape}"
    lowest_U = np.full(num_units, np.iinfo(np.int64).max)
    np.minimum.at(lowest_U, unit_N, cells)
    return np.asarray(np.unique(lowest_U, return_inverse=True)[1], dtype=np.int64)


def _share_by_cell(cell_U: Ints, draw_U: Floats, shares: tuple[float, ...], rng: np.random.Generator) -> Codes:
    """One drawn unit of each cell to train; of the others, cell after cell, every so-manieth to val or test."""
    num_units = len(cell_U)
    by_cell_U = np.lexsort((draw_U, cell_U))
    is_first_U = np.diff(cell_U[by_cell_U], prepend=-1) > 0
    other = by_cell_U[~is_first_U]
    num_val, num_test = (max(1, round(share * num_units)) for share in shares[1:])
    held_out = other[_evenly(len(other), min(num_val + num_test, len(other)), rng)]
    is_val = _evenly(len(held_out), round(len(held_out) * num_val / (num_val + num_test)), rng)
    code_U = np.zeros(num_units, dtype=np.int8)
    code_U[held_out] = np.where(is_val, 1, 2)
    return code_U


def _evenly(length: int, count: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """[length] flags, `count` of them set, as evenly as whole numbers allow, from a drawn start."""
    if not length:
        return np.zeros(0, dtype=np.bool_)
    steps = np.arange(length + 1) * count + int(rng.integers(length))
    return np.diff(steps // length) > 0


def _share_blocks(block_U: Ints, shares: tuple[float, ...], rng: np.random.Generator) -> Codes:
    """Whole blocks, the largest first: each to a split with room for it, drawn by how much room that has left.

    So a large block has its fair chance to be held out, and the small ones fill what is left: the shares are met.
    """
    size_G = np.bincount(block_U)
    order = np.lexsort((rng.random(len(size_G)), -size_G))
    draws = rng.random(len(size_G)).tolist()
    room = [share * len(block_U) for share in shares]
    code_G = np.zeros(len(size_G), dtype=np.int8)
    for block, size, draw in zip(order.tolist(), size_G[order].tolist(), draws, strict=True):
        # Half a unit short is room enough: shares of a whole number of units are seldom whole.
        fitting = [left if left + 0.5 >= size else 0.0 for left in room]
        total = sum(fitting)
        if total > 0:
            mark = draw * total
            code = 0 if mark < fitting[0] else 1 if mark < fitting[0] + fitting[1] else 2
        else:
            code = room.index(max(room))
        room[code] -= size
        code_G[block] = code
    return code_G[block_U]


def _near_held_out(spot_K2: Floats, code_K: Codes, buffer_km: float) -> Ints:
    """The spots of train within the buffer of one of val or test."""
    train, held_out = np.flatnonzero(code_K == 0), np.flatnonzero(code_K > 0)
    if not len(train) or not len(held_out):
        return train[:0]
    return train[nearest(spot_K2[train], spot_K2[held_out], buffer_km)[0] < np.inf]


def _check_shared_spots(
    code_N: Codes, spot_K2: Floats, spot_N: Ints, source: str, name_of: Callable[[int], str]
) -> None:
    rows = np.flatnonzero(code_N >= 0)
    lowest_K = np.full(len(spot_K2), 127, dtype=np.int8)
    highest_K = np.full(len(spot_K2), -1, dtype=np.int8)
    np.minimum.at(lowest_K, spot_N[rows], code_N[rows])
    np.maximum.at(highest_K, spot_N[rows], code_N[rows])
    shared_K = (highest_K >= 0) & (lowest_K != highest_K)
    if not shared_K.any():
        return
    first = int(rows[np.argmax(shared_K[spot_N[rows]])])
    there = rows[spot_N[rows] == spot_N[first]]
    other = int(there[np.argmax(code_N[there] != code_N[first])])
    lat, lon = spot_K2[spot_N[first]].tolist()
    raise SplitError(
        f"{source} leaks: {_counted(shared_K, 'place stands', 'places stand')} in more than one split; the first is "
        f"lat {lat:.6f}, lon {lon:.6f}: {name_of(first)} in {SPLITS[code_N[first]]}, {name_of(other)} in "
        f"{SPLITS[code_N[other]]}; give all rows of a place to one split"
    )


def _check_distance(
    points: Floats, code_N: Codes, buffer_km: float, source: str, name_of: Callable[[int], str]
) -> None:
    train, held_out = np.flatnonzero(code_N == 0), np.flatnonzero(code_N > 0)
    _, row = nearest(points[train], points[held_out], buffer_km)
    near = np.flatnonzero(row < len(held_out))
    distance_km = haversine_km(points[train[near]], points[held_out[row[near]]])
    is_near = distance_km < buffer_km * (1 - 1e-9)
    if not is_near.any():
        return
    nearby = int(near[np.argmax(is_near)])
    first, other = int(train[nearby]), int(held_out[row[nearby]])
    raise SplitError(
        f"{source} leaks: {_counted(is_near, 'row of train is', 'rows of train are')} nearer than {buffer_km:g} km to "
        f"one of val or test; "
        f"the first is {name_of(first)}, {distance_km[np.argmax(is_near)]:.3g} km from {name_of(other)} of "
        f"{SPLITS[code_N[other]]}; leave such rows out, or give a smaller --buffer-km"
    )


def _counted(is_such: NDArray[np.bool_], one: str, many: str) -> str:
    number = int(is_such.sum())
    return f"{number} {one if number == 1 else many}"


def _check_filled(code_N: Codes, remedy: str) -> None:
    empty = [name for code, name in enumerate(SPLITS) if not (code_N == code).any()]
    if empty:
        raise SplitError(f"{' and '.join(empty)} would have no place. {remedy[0].upper()}{remedy[1:]}")


def _too_few(num_places: int, block_km: float | None, buffer_km: float) -> str:
    if block_km is None:
        return f"{num_places} distinct places are too few, or too few to a cell: give more, or coarser cells"
    return (
        f"{num_places} distinct places in blocks of {block_km:g} km with a buffer of {buffer_km:g} km: give a smaller "
        f"--block-km or --buffer-km, or more places"
    )
