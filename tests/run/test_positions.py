"""`geoloc cells` and `geoloc evaluate` through the command line, on what the other commands wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
from small_world import World, draw_jpeg, write_tar

from geoloc_batch import evaluate_predictions
from geoloc_batch.cli import main
from geoloc_batch.errors import InputError
from geoloc_batch.geo.partition import load_partition
from geoloc_batch.run.positions import read_positions

Geoloc = Callable[..., tuple[int, dict[str, Any]]]


def shard_of(path: Path, metas: list[Any]) -> Path:
    members = []
    for row, meta in enumerate(metas):
        members += [(f"{row}.jpg", draw_jpeg(row)), (f"{row}.json", json.dumps(meta).encode())]
    return write_tar(path, members)


def test_positions_are_the_same_from_a_table_from_shards_and_from_embeddings(
    world: World, geoloc: Geoloc, tmp_path: Path
) -> None:
    places = [(48.2, 16.4), (-33.9, 151.2), (0.0, 0.0), (64.1, -21.9)]
    shard = shard_of(tmp_path / "a.tar", [{"lat": lat, "lon": lon} for lat, lon in places])
    pa.csv.write_csv(pa.table({"lat": [p[0] for p in places], "lon": [p[1] for p in places]}), tmp_path / "a.csv")
    geoloc("embed", shard, "--out", tmp_path / "emb", *world.encoder_flags)

    for given in (tmp_path / "a.csv", shard, tmp_path / "emb"):
        found = read_positions(str(given))
        assert found.point_deg.tolist() == [list(place) for place in places], given
        assert not found.bad


def test_photos_without_a_position_are_counted_and_never_put_at_null_island(tmp_path: Path) -> None:
    metas = [{"Latitude": "48.2", "LNG": 16.4}, {}, {"latitude": None, "lng": 1}, {"latitude": 91, "lng": 1}, ["no"]]
    found = read_positions(str(shard_of(tmp_path / "a.tar", metas)))
    assert found.point_deg.tolist() == [[48.2, 16.4]]
    assert found.num_bad == {"NaN": 3, "out of range": 1}
    with pytest.raises(InputError, match="no such"):
        read_positions(str(tmp_path / "absent.csv"))
    with pytest.raises(InputError, match="absent"):
        read_positions(str(tmp_path / "absent.tar"))


def test_cells_are_built_shown_converted_and_measured(geoloc: Geoloc, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    table = pa.table({"lat": rng.uniform(36, 70, 400), "lon": rng.uniform(-10, 40, 400)})
    pa.csv.write_csv(table, tmp_path / "points.csv")
    cells = tmp_path / "cells.json"

    code, built = geoloc("cells", "build", "kdtree", tmp_path / "points.csv", "--max-points", 39, "--out", cells)
    assert (code, built["points"], built["cells"]) == (0, 400, len(load_partition(cells)))
    code, _ = geoloc("cells", "convert", cells, tmp_path / "cells.parquet")
    assert code == 0
    assert load_partition(tmp_path / "cells.parquet") == load_partition(cells)
    assert geoloc("cells", "show", cells)[1]["cells"] == built["cells"]
    code, reached = geoloc("cells", "ceiling", tmp_path / "cells.parquet", tmp_path / "points.csv")
    assert (code, reached["outside"], reached["assigned"]["points"]) == (0, 0, 400)
    assert reached["nearest"]["percent"]["within_2500_km"] == 100


def test_predictions_are_measured_against_the_truth(world: World, geoloc: Geoloc, tmp_path: Path) -> None:
    out = tmp_path / "pred"
    geoloc("predict", world.shards, "--out", out, *world.encoder_flags, *world.head_flags)
    # The photos of this world lie within a degree of longitude 0, wherever its head puts them.
    truth = pa.table({"key": ["00/0000", "00/0001", "nowhere"], "lat": [40.0, 41.0, 0.5], "lon": [0.0, 0.0, 0.5]})
    pa.csv.write_csv(truth, tmp_path / "truth.csv")

    code, told = geoloc(
        "evaluate", out, "--truth", tmp_path / "truth.csv", "--cells", world.cells, "--out", tmp_path / "e"
    )

    assert (code, told["rows"], told["asked"]) == (0, 2, 3)
    assert told["coverage"] == pytest.approx(200 / 3)
    assert told["top_1"] is not None
    assert told == pytest.approx(
        evaluate_predictions(out, truth=tmp_path / "truth.csv", cells=str(world.cells), out=tmp_path / "e").by_name()
    )
    assert json.loads((tmp_path / "e" / "metrics.json").read_text())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cells"], "a further word is missing; there are build h3"),
        (["cells", "draw"], "no command 'draw'; there are build h3"),
        (["cells", "build"], "a further word is missing; there are h3, kmeans"),
        (["cells", "build", "hexagons"], "no command 'hexagons'; there are h3, kmeans"),
        (["cell"], "no command 'cell'; there are pack, embed"),
    ],
)
def test_a_command_of_several_words_that_is_none_is_told_what_there_is(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert said in capsys.readouterr().err
    assert main([*words[:1], "--help"]) == (0 if words[0] == "cells" else 2)
