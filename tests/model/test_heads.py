"""The table of the published heads, and `geoloc heads`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from geoloc_batch.cli import main
from geoloc_batch.model.heads import DEFAULT_HEAD, HEADS_REPO, PUBLISHED_HEADS, format_heads, list_heads, published
from geoloc_batch.model.hub import commit_of

# The rows of the card: path, partition, cells, top-1 in percent, balscore.
CARD = """
ablation_v13_weighted/lam_0.05/best.pt | H3 res=4 EU | 1 898 | 29.7 | 63.1
ablation_v13_weighted/lam_0.01/best.pt | H3 res=4 EU | 1 898 | 29.3 | 62.8
ablation_v12/seed_44/best.pt | H3 res=4 EU | 1 898 | 28.8 | 62.1
sweep_v5/streetclip/h3_res4_eu/best.pt | H3 res=4 EU | 1 898 | 28.3 | 61.5
sweep_v5/streetclip/k2000_eu/best.pt | K-Means k=2000 EU | 1 792 | 27.5 | 60.0
sweep_v5/streetclip/k4000_eu/best.pt | K-Means k=4000 EU | 3 180 | 22.9 | 60.0
sweep_v5/streetclip/kdtree19_eu/best.pt | K-d tree t=19 EU | 5 444 | 15.7 | 58.6
sweep_v5/streetclip/kdtree39_eu/best.pt | K-d tree t=39 EU | 2 059 | 21.8 | 58.4
sweep_v5/streetclip/k1000_eu/best.pt | K-Means k=1000 EU | 957 | 36.2 | 57.9
sweep_v5/streetclip/nuts3_eu/best.pt | NUTS-3 EU | 1 194 | 37.6 | 56.8
sweep_v5/streetclip/kdtree78_eu/best.pt | K-d tree t=78 EU | 1 029 | 27.5 | 55.3
sweep_v5/streetclip/k500_eu/best.pt | K-Means k=500 EU | 487 | 43.4 | 51.7
sweep_v5/streetclip/kdtree155_eu/best.pt | K-d tree t=155 EU | 515 | 36.1 | 50.7
"""


def test_the_table_is_the_cards() -> None:
    rows = [[part.strip() for part in line.split("|")] for line in CARD.strip().splitlines()]
    told = [(row[0], row[1], int(row[2].replace(" ", "")), float(row[3]), float(row[4])) for row in rows]
    ours = [(h.path, h.partition, h.num_cells, h.top_1_percent, h.balscore) for h in PUBLISHED_HEADS]
    assert ours == told
    assert DEFAULT_HEAD.name == "eu-h3r4-v13"
    assert DEFAULT_HEAD.path == told[0][0]


def test_heads_of_one_partition_share_its_cells_and_names_are_all_different() -> None:
    folders = {(head.partition, head.cells_path) for head in PUBLISHED_HEADS}
    assert len(folders) == len({cells for _, cells in folders}) == 10
    assert published("eu-nuts3").cells_path == "data_collection/outputs/geocells_nuts3_eu/geocell_info.json"  # type: ignore[union-attr]
    assert DEFAULT_HEAD.cells_path == "data_collection/outputs/geocells_h3_res4_eu/geocell_info.json"
    assert len({head.name for head in PUBLISHED_HEADS}) == 13
    assert all(published(head.name) is published(head.file) is head for head in PUBLISHED_HEADS)
    assert published("eu-h3r4-v14") is None


def test_the_listing_marks_the_default_and_what_is_wholly_in_the_cache() -> None:
    nuts, kmeans = published("eu-nuts3"), published("eu-kmeans500")
    assert nuts is not None
    assert kmeans is not None
    # Of the second the cells are missing.
    there = {nuts.path, nuts.cells_path, kmeans.path}
    listing = list_heads(lambda repo, path: Path("x") if repo == HEADS_REPO and path in there else None)
    assert [head["name"] for head in listing["heads"] if head["cached"]] == ["eu-nuts3"]
    lines = format_heads(listing).splitlines()[1:14]
    assert [line.split()[0] for line in lines] == [head.name for head in PUBLISHED_HEADS]
    assert [line.split()[0] for line in lines if " * " in line] == ["eu-h3r4-v13"]
    assert [line.split()[0] for line in lines if line.endswith("yes")] == ["eu-nuts3"]
    assert "1194  37.6 %      56.8" in lines[9]


def test_heads_is_a_command_and_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["heads"]) == 0
    listing = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (listing["default"], listing["licence"], len(listing["heads"])) == ("eu-h3r4-v13", "MIT", 13)
    assert main(["heads", "--help"]) == 0
    overview = capsys.readouterr().out
    assert "\n  heads " in overview
    assert "\n  heads convert " in overview
    assert main(["heads", "conver"]) == 2
    assert "no command 'conver'; there are convert" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["heads", "convert", "--help"])
    assert stop.value.code == 0
    assert "--trust" in capsys.readouterr().out


def test_the_listing_needs_no_torch() -> None:
    code = "from geoloc_batch.cli import main; import sys; main(['heads']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_commit_is_read_off_the_caches_folder(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert commit_of(tmp_path / "snapshots" / commit / "a" / "b" / "best.pt") == commit
    assert commit_of(tmp_path / commit / "best.pt") is None
    assert commit_of(tmp_path / "snapshots" / "main" / "best.pt") is None
