"""What is wrong with the tables, in numbers and in words: the thing, its value, the remedy.

Shape letters: N rows of the truth, P predictions.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from geoloc_batch.evaluate.evaluation import Counts
from geoloc_batch.evaluate.pairs import Pairs, Side
from geoloc_batch.evaluate.places import Swap, find_swap
from geoloc_batch.evaluate.progress import Progress

Flags = NDArray[np.bool_]


def look_for_swap(pairs: Pairs) -> Swap | None:
    """Whether lat and lon of one side look swapped, by the rows that have both coordinates on both sides."""
    row_N = np.where(pairs.row_N < 0, 0, pairs.row_N)
    found, true = pairs.predictions.places, pairs.truth.places
    if not len(found.point_deg_N2):
        return None
    usable_N = (pairs.row_N >= 0) & ~true.is_missing_N & ~found.is_missing_N[row_N]
    return find_swap(found.point_deg_N2[row_N[usable_N]], true.point_deg_N2[usable_N])


def count(pairs: Pairs, is_compared_N: Flags, swap: Swap | None) -> Counts:
    """Rows of both tables by what became of them.

    Args:
        pairs: both tables.
        is_compared_N: [N] rows of the truth that have a place and a predicted place.
        swap: as `look_for_swap` says.
    """
    found, true = pairs.predictions.places, pairs.truth.places
    has_truth_P = np.zeros(len(found.is_missing_N), dtype=bool)
    has_truth_P[pairs.row_N[(pairs.row_N >= 0) & true.is_place_N]] = True
    return Counts(
        predictions=len(has_truth_P),
        predictions_without_place=int(found.is_missing_N.sum()),
        predictions_out_of_range=int(found.is_out_of_range_N.sum()),
        predictions_at_null_island=int(found.is_null_island_N.sum()),
        predictions_without_truth=int((~has_truth_P).sum()),
        truth=len(is_compared_N),
        truth_without_place=int(true.is_missing_N.sum()),
        truth_out_of_range=int(true.is_out_of_range_N.sum()),
        truth_at_null_island=int(true.is_null_island_N.sum()),
        truth_without_prediction=int((true.is_place_N & ~is_compared_N).sum()),
        error_rows=pairs.error_rows,
        units_not_done=pairs.progress.units_not_done if pairs.progress else None,
        unit_errors=pairs.progress.unit_errors if pairs.progress else None,
        is_swapped=swap is not None,
    )


def warnings_of(pairs: Pairs, counts: Counts, swap: Swap | None) -> tuple[str, ...]:
    """Everything that a reader of the metrics should know, one sentence each."""
    return tuple(_warnings(pairs, counts, swap))


def _warnings(pairs: Pairs, counts: Counts, swap: Swap | None) -> Iterator[str]:
    if swap:
        yield _swap_words(pairs, swap)
    if pairs.num_repeats:
        yield f"{pairs.truth.name}: {pairs.num_repeats} rows say again what an earlier row of their key says: left out"
    for side, role in ((pairs.truth, "truth"), (pairs.predictions, "predictions")):
        becomes = "left out" if role == "truth" else "counted as not predicted"
        places = side.places
        if places.is_missing_N.any():
            yield f"{side.name}: {_first(side, places.is_missing_N)} without lat or lon (or NaN): {becomes}"
        if places.is_out_of_range_N.any():
            yield f"{side.name}: {_first(side, places.is_out_of_range_N)} with no place on Earth: {becomes}"
        if places.is_null_island_N.any():
            rows = _first(side, places.is_null_island_N)
            remedy = "clear lat and lon where it is a gap filled with zeros"
            yield f"{side.name}: {rows} at (0, 0), null island: compared; {remedy}"
    if counts.predictions_without_truth:
        yield f"{counts.predictions_without_truth} of {counts.predictions} predictions have no truth: left out"
    if counts.truth_without_prediction:
        asked = counts.truth - counts.truth_without_place - counts.truth_out_of_range
        yield f"{counts.truth_without_prediction} of {asked} true places have no prediction: they lower the coverage"
    if counts.error_rows:
        yield f"{counts.error_rows} photos gave an error row in place of a prediction: they lower the coverage"
    if pairs.progress and not pairs.progress.is_whole:
        yield _unread(pairs.progress, has_own_truth=pairs.has_own_truth)


def nothing_to_compare(pairs: Pairs, counts: Counts, swap: Swap | None) -> str:
    """Why no row at all could be compared."""
    predictions, truth = pairs.predictions, pairs.truth
    if not counts.predictions or not counts.truth:
        return f"{(truth if counts.predictions else predictions).name} has no row; give a table with some"
    if swap:
        return f"nothing can be compared. {_swap_words(pairs, swap)}"
    if (pairs.row_N < 0).all():
        shown = [f"{side.name} has {side.table['key'][0].as_py()!r}" for side in (predictions, truth)]
        if all("shard" in side.table.column_names for side in (predictions, truth)):
            shards = [side.table["shard"][0].as_py() for side in (predictions, truth)]
            shown = [f"{text} of shard {shard!r}" for text, shard in zip(shown, shards, strict=True)]
        return (
            f"no prediction has a key of the truth: {shown[0]}, {shown[1]}. A key is the photo's path in its shard "
            f"without the last extension; choose the column with --key-column, or mend it"
        )
    reasons = " ".join(f"{warning}." for warning in _warnings(pairs, counts, None))
    return f"nothing can be compared: no row has both a true and a predicted place. {reasons}"


def _unread(progress: Progress, *, has_own_truth: bool) -> str:
    covered = "coverage is of what was read" + ("" if has_own_truth else " and of what the truth names besides")
    if progress.complaint:
        return f"how far the run is cannot be told ({progress.complaint}): {covered}"
    not_done, errors = progress.units_not_done, progress.unit_errors
    return (
        f"{progress.out}: {not_done} of {progress.units} units {'is' if not_done == 1 else 'are'} not done, {errors} "
        f"{'has a unit error' if errors == 1 else 'have unit errors'}: {covered}; "
        f"{'finish the run' if not_done else '`geoloc retry` reads again what another try may mend'}"
    )


def _swap_words(pairs: Pairs, swap: Swap) -> str:
    is_truth = swap.side == "truth"
    name = (pairs.truth if is_truth else pairs.predictions).name
    before = f"instead of {swap.median_km:.0f} km" if np.isfinite(swap.median_km) else "instead of out of range"
    remedy = "pass --lat-column and --lon-column the other way round" if is_truth else "swap the columns"
    doubt = "" if swap.is_sure else f", unless those of {pairs.predictions.name} are wrong"
    return (
        f"{name}: lat and lon look swapped: {swap.num_closer} of {swap.num_rows} rows come closer by swapping them "
        f"(median {swap.swapped_median_km:.0f} km {before}); {remedy}{doubt}"
    )


def _first(side: Side, is_such_N: Flags) -> str:
    """12 rows (first: 'a/b', lat 91.5, lon 3.0)."""
    row = int(np.argmax(is_such_N))
    lat, lon = side.places.point_deg_N2[row].tolist()
    num_rows = int(is_such_N.sum())
    first = f"{side.table['key'][row].as_py()!r}, lat {lat:g}, lon {lon:g}"
    return f"{num_rows} row{'s' if num_rows > 1 else ''} ({'first: ' if num_rows > 1 else ''}{first})"
