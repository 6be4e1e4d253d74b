"""Published heads by short names, and the position that suits a head, as the factory sees them."""

from __future__ import annotations

from pathlib import Path

import locate_samples as samples
import pytest
from built_locators import DEFAULT_FILES, PUBLISHED, Hub, build, names, put_published

from geoloc_batch.errors import HeadError, PartitionError


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    return Hub(tmp_path / "hub")


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("eu-h3r4-v13", "eu-h3r4-v13"),
        ("mine=eu-h3r4-v13", "mine"),
        (f"hf:{PUBLISHED}/ablation_v13_weighted/lam_0.05/best.pt", "lam_0.05"),
    ],
)
def test_a_published_head_has_its_own_cells_whatever_it_is_called(hub: Hub, given: str, name: str) -> None:
    put_published(hub)
    assert names([given], hub=hub) == [name]
    assert sorted(hub.asked) == sorted(DEFAULT_FILES)


def test_heads_on_one_partition_fetch_its_cells_once(hub: Hub) -> None:
    put_published(hub)
    samples.write_head(hub.folder / PUBLISHED / "ablation_v12" / "seed_44", num_cells=9, cells=False)
    assert names(["eu-h3r4-v12", "eu-h3r4-v13", "eu-h3r4-v13"], hub=hub) == [
        "eu-h3r4-v12",
        "eu-h3r4-v13",
        "eu-h3r4-v13-2",
    ]
    assert [file for _, file in hub.asked].count(DEFAULT_FILES[0][1]) == 1


def test_a_published_head_of_another_size_is_taken_as_it_is_with_a_warning(
    hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    put_published(hub, num_cells=1898)
    build(["eu-h3r4-v13"], hub=hub)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    put_published(hub, num_cells=9)
    (locator,) = build(["eu-h3r4-v13"], hub=hub)
    assert locator.identity["num_cells"] == 9
    assert "has 9 cells, the published table says 1898" in caplog.text


def test_a_short_name_is_the_published_head_although_a_file_is_called_so(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_published(hub)
    monkeypatch.chdir(tmp_path)
    samples.write_head(tmp_path, name="eu-h3r4-v13", num_cells=7)
    assert build(["eu-h3r4-v13"], hub=hub)[0].identity["num_cells"] == 9
    assert build(["./eu-h3r4-v13"])[0].identity["num_cells"] == 7


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("eu-kmean500", r"no such head: eu-kmean500; did you mean eu-kmeans500"),
        ("EU-NUTS3", r"did you mean eu-nuts3\?"),
        ("h3r4-v12", r"did you mean eu-h3r4-v12\?"),
        ("x=kdtree19", r"no such head: kdtree19; did you mean eu-kdtree19\?"),
        ("moon", r"no such head: moon; `geoloc heads` lists the published ones"),
    ],
)
def test_a_misspelt_short_name_gets_the_near_ones_even_where_cells_are_given(
    tmp_path: Path, given: str, words: str
) -> None:
    samples.make_partition(7).save(tmp_path / "cells.json")
    for cells in ([], [tmp_path / "cells.json"]):
        with pytest.raises(HeadError, match=words):
            build([given], cells)


def test_local_files_are_looked_at_before_anything_is_fetched(hub: Hub, tmp_path: Path) -> None:
    put_published(hub)
    with pytest.raises(PartitionError, match=r"no such file of cells"):
        build(["eu-h3r4-v13"], [tmp_path / "absent.json"], hub=hub)
    with pytest.raises(HeadError, match=r"no such head"):
        build(["eu-h3r4-v13", tmp_path / "absent.pt"], hub=hub)
    assert hub.asked == []
    # Nor are the cells of a head that the encoder does not fit.
    with pytest.raises(HeadError, match=r"the encoder gives 6 pooled"):
        build(["eu-h3r4-v13"], dim=6, hub=hub)
    assert hub.asked == DEFAULT_FILES[1:]


def test_each_head_gives_the_position_that_suits_it_unless_one_is_asked_for(tmp_path: Path) -> None:
    heads = [samples.write_head(tmp_path / name) for name in ("mean", "top1", "silent")]
    for head in heads[:2]:
        samples.write_remarks(head.parent, {"position": head.parent.name})
    assert [locator.position for locator in build(heads)] == ["mean", "top1", "top1"]
    assert [locator.position for locator in build(heads, position="top1")] == ["top1"] * 3
    assert [locator.position for locator in build(heads, position="mean")] == ["mean"] * 3
    located = build(heads[:1])[0].locate(samples.make_features(3, 5))
    assert (located.position_deg == located.mean_deg).all()


@pytest.mark.parametrize(("says", "position"), [(("mean", "mean"), "mean"), (("mean", "top1"), "top1")])
def test_heads_asked_together_give_the_mean_where_it_suits_them_all(
    tmp_path: Path, says: tuple[str, str], position: str
) -> None:
    heads = [samples.write_head(tmp_path / str(seed), seed=seed) for seed in range(2)]
    for head, its in zip(heads, says, strict=True):
        samples.write_remarks(head.parent, {"position": its})
    assert build(heads, combine=True)[0].position == position
