"""From --head and --cells to locators: names, files, the hub, and what does not fit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import locate_samples as samples
import pytest
import torch
from built_locators import DEFAULT_FILES, PUBLISHED, Hub, build, names, put_published

from geoloc_batch.errors import ConfigError, HeadError, HubError, PartitionError
from geoloc_batch.locate.config import LocateConfig
from geoloc_batch.locate.factory import build_locators
from geoloc_batch.locate.head_file import save_head


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    return Hub(tmp_path / "hub")


def test_without_a_head_the_published_one_is_fetched_with_its_cells(hub: Hub) -> None:
    put_published(hub)
    (locator,) = build([], hub=hub)
    assert sorted(hub.asked) == sorted(DEFAULT_FILES)
    assert (locator.name, locator.dim, locator.identity["num_cells"]) == ("eu-h3r4-v13", 5, 9)


def test_the_published_head_may_meet_cells_of_the_users_own(hub: Hub, tmp_path: Path) -> None:
    put_published(hub)
    samples.make_partition(9, seed=4).save(tmp_path / "mine.json")
    (locator,) = build([], [tmp_path / "mine.json"], hub=hub)
    assert hub.asked == DEFAULT_FILES[1:]
    assert locator.identity["cells_sha256"] == samples.make_partition(9, seed=4).fingerprint


def test_a_named_published_head_still_finds_its_cells(hub: Hub) -> None:
    put_published(hub)
    assert names([f"eu=hf:{PUBLISHED}/ablation_v13_weighted/lam_0.05/best.pt"], hub=hub) == ["eu"]
    assert sorted(hub.asked) == sorted(DEFAULT_FILES)


def test_files_of_the_hub_and_of_the_disk_go_together(hub: Hub, tmp_path: Path) -> None:
    samples.write_head(hub.folder / "me" / "heads" / "north", seed=1)
    local = samples.write_head(tmp_path / "south", seed=2)
    locators = build(
        ["hf:me/heads/north/best.pt", local],
        ["hf:me/heads/north/geocell_info.json", tmp_path / "south" / "geocell_info.json"],
        hub=hub,
    )
    assert [locator.name for locator in locators] == ["north", "south"]
    assert sorted(hub.asked) == [("me/heads", "north/best.pt"), ("me/heads", "north/geocell_info.json")]
    assert [locator.identity["cells_sha256"] for locator in locators] == [
        samples.make_partition(7, seed=seed).fingerprint for seed in (1, 2)
    ]


@pytest.mark.parametrize("file", ["hf:", "hf:me", "hf:me/heads", "hf:me/heads/", "hf:/heads/best.pt", "hf:me//best.pt"])
def test_an_hf_path_without_owner_repository_or_file_is_refused(file: str, tmp_path: Path) -> None:
    samples.make_partition(7).save(tmp_path / "cells.json")
    with pytest.raises(ConfigError, match=r"must be hf:OWNER/REPO/PATH"):
        build([file], [tmp_path / "cells.json"])


def test_what_the_hub_says_passes_through(hub: Hub, tmp_path: Path) -> None:
    samples.make_partition(7).save(tmp_path / "cells.json")
    with pytest.raises(HubError, match=r"me/heads: no best.pt"):
        build(["hf:me/heads/best.pt"], [tmp_path / "cells.json"], hub=hub)


def test_a_head_without_cells_is_refused_before_anything_is_fetched(hub: Hub, tmp_path: Path) -> None:
    put_published(hub)
    samples.write_head(tmp_path / "lone", cells=False)
    with pytest.raises(
        ConfigError, match=r"lone/best.pt has no cells: give its geocell_info.json with --cells, or put"
    ):
        build([f"hf:{PUBLISHED}/ablation_v13_weighted/lam_0.05/best.pt", tmp_path / "lone" / "best.pt"], hub=hub)
    with pytest.raises(
        ConfigError, match=r"the head hf:me/heads/best.pt has no cells: give its geocell_info.json with"
    ):
        build(["hf:me/heads/best.pt"], hub=hub)
    assert hub.asked == []


def test_cells_beside_the_head_are_found_and_cells_given_win(tmp_path: Path) -> None:
    path = samples.write_head(tmp_path / "north")
    (beside,) = build([path])
    assert beside.identity["cells_sha256"] == samples.make_partition(7).fingerprint
    samples.make_partition(7, seed=9).save(tmp_path / "other.json")
    (given,) = build([path], [tmp_path / "other.json"])
    assert given.identity["cells_sha256"] == samples.make_partition(7, seed=9).fingerprint


def test_one_file_of_cells_serves_all_heads_and_is_read_once(tmp_path: Path) -> None:
    heads = [samples.write_head(tmp_path / name, seed=seed) for seed, name in enumerate("abc")]
    cells = tmp_path / "cells.json"
    samples.make_partition(7, seed=5).save(cells)
    locators = build(heads, [cells])
    assert len({id(locator.partition) for locator in locators}) == 1  # type: ignore[attr-defined]
    assert locators[0].identity["cells_sha256"] == samples.make_partition(7, seed=5).fingerprint
    assert [locator.name for locator in locators] == ["a", "b", "c"]


def test_each_head_has_the_cells_at_its_own_place_in_the_list(tmp_path: Path) -> None:
    sizes = {"a": 7, "b": 4, "c": 11}
    heads, cells = [], []
    for name, size in sizes.items():
        heads.append(samples.write_head(tmp_path / name, num_cells=size, cells=False))
        cells.append(tmp_path / f"{name}.json")
        samples.make_partition(size).save(cells[-1])
    assert [locator.identity["num_cells"] for locator in build(heads, cells)] == [7, 4, 11]
    with pytest.raises(HeadError, match=r"a/best.pt chooses among 7 cells, .*c.json has 11"):
        build(heads, cells[::-1])
    with pytest.raises(ConfigError, match=r"--cells was given 2 times for 3 --head; give it once, or once for each"):
        build(heads, cells[:2])


def test_names_come_from_the_folder_of_best_pt_or_from_the_file(tmp_path: Path) -> None:
    paths = [
        samples.write_head(tmp_path / "lam_0.05"),
        samples.write_head(tmp_path / "x", name="north.v2.pt"),
        samples.write_head(tmp_path / "my heads (new)"),
        samples.write_head(tmp_path / "_Ünïcode_"),
        samples.write_head(tmp_path / "..."),
    ]
    save_head(tmp_path / "x" / "south.safetensors", samples.make_state(7, 5))
    save_head(tmp_path / "x" / "best.safetensors", samples.make_state(7, 5))
    paths += [tmp_path / "x" / "south.safetensors", tmp_path / "x" / "best.safetensors"]
    assert names(paths) == ["lam_0.05", "north.v2", "my-heads-new", "n-code", "head", "south", "x"]


def test_a_best_pt_in_the_working_folder_is_named_after_that_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples.write_head(tmp_path / "north")
    monkeypatch.chdir(tmp_path / "north")
    assert names(["best.pt"]) == ["north"]


def test_a_link_into_the_hubs_cache_is_named_after_the_link_not_the_hash(tmp_path: Path) -> None:
    path = samples.write_head(tmp_path / "lam_0.05")
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    shutil.move(path, blob)
    path.symlink_to(blob)
    assert names([path]) == ["lam_0.05"]


def test_derived_names_that_meet_are_told_apart_whatever_their_case(tmp_path: Path) -> None:
    paths = [samples.write_head(tmp_path / str(i) / name) for i, name in enumerate(["north", "North", "north"])]
    assert names(paths) == ["north", "North-2", "north-3"]
    assert names([paths[0], f"north={paths[1]}"]) == ["north-2", "north"]
    assert names([paths[0], paths[0]]) == ["north", "north-2"]


def test_no_name_is_that_of_a_folder_of_the_run_itself(tmp_path: Path) -> None:
    paths = [samples.write_head(tmp_path / name) for name in ("predictions", "img_emb")]
    assert names(paths) == ["predictions-2", "img_emb-2"]
    for name in ("img_emb", "metadata", "Predictions", "errors", "run.json"):
        with pytest.raises(ConfigError, match=rf"{name} is a name of the output folder's own"):
            build([f"{name}={paths[0]}"])


def test_a_name_given_is_kept_as_it_is(tmp_path: Path) -> None:
    path = samples.write_head(tmp_path / "lr=0.1")
    assert names([f"North_1.x-2={path}"]) == ["North_1.x-2"]
    # No name: the equals sign belongs to the path.
    assert names([path]) == ["lr-0.1"]


def test_a_file_with_an_equals_sign_in_its_name_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples.write_head(tmp_path, name="lr=0.1.pt")
    monkeypatch.chdir(tmp_path)
    assert names(["lr=0.1.pt"]) == ["lr-0.1"]
    assert names(["a=lr=0.1.pt"]) == ["a"]


@pytest.mark.parametrize("name", ["", ".hidden", "_x", "-x", "a b", "Zürich", "a,b"])
def test_a_name_that_makes_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    path = samples.write_head(tmp_path)
    with pytest.raises(ConfigError, match=r"must begin with a letter or digit and hold only letters, digits, \. _ -"):
        build([f"{name}={path}"])


@pytest.mark.parametrize("second", ["north", "NORTH"])
def test_two_heads_of_one_name_are_refused(tmp_path: Path, second: str) -> None:
    a, b = samples.write_head(tmp_path / "a"), samples.write_head(tmp_path / "b")
    with pytest.raises(
        ConfigError, match=rf"two heads are named {second}: .*a/best.pt and .*b/best.pt; give each its own"
    ):
        build([f"north={a}", f"{second}={b}"])


def test_a_head_that_is_not_there_is_refused_with_or_without_cells(tmp_path: Path) -> None:
    samples.make_partition(7).save(tmp_path / "cells.json")
    for cells in ([], [tmp_path / "cells.json"]):
        with pytest.raises(HeadError, match=r"no such head: .*absent/best.pt; give a best.pt or .safetensors"):
            build([tmp_path / "absent" / "best.pt"], cells)


def test_cells_that_are_not_there_or_broken_are_refused(tmp_path: Path) -> None:
    path = samples.write_head(tmp_path)
    with pytest.raises(PartitionError, match=r"no such file of cells: .*absent.json"):
        build([path], [tmp_path / "absent.json"])
    (tmp_path / "geocell_info.json").write_text("{}")
    with pytest.raises(PartitionError, match=r"geocell_info.json holds no cell"):
        build([path])


@pytest.mark.parametrize(
    ("encoder", "words"),
    [
        ({"tap": "projected"}, r"expects 5 pooled features, the encoder gives 5 projected ones; pass --tap pooled"),
        (
            {"dim": 6},
            r"expects 5 pooled features, the encoder gives 6 pooled ones; give the encoder the head was trained",
        ),
        ({"dim": 6, "tap": "projected"}, r"the encoder gives 6 projected ones; pass --tap pooled"),
        (
            {"tap": "projected", "features": "stored"},
            r"the stored embeddings are 5 projected ones; embed the photos again with --tap pooled$",
        ),
        ({"dim": 6, "features": "stored"}, r"embed the photos again with the encoder the head was trained on$"),
        (
            {"tap": "projected", "features": "foreign"},
            r"taken for 5 projected ones; pass --tap pooled if that is what they are, else embed the photos again",
        ),
    ],
)
def test_features_of_another_tap_or_width_are_refused(tmp_path: Path, encoder: dict[str, Any], words: str) -> None:
    path = samples.write_head(tmp_path)
    with pytest.raises(HeadError, match=words) as caught:
        build([path], **encoder)
    assert str(path) in str(caught.value)


def test_a_head_for_projected_features_takes_those_alone(tmp_path: Path) -> None:
    samples.make_partition(7).save(tmp_path / "geocell_info.json")
    path = tmp_path / "text.safetensors"
    save_head(path, samples.make_state(7, 5), remarks={"tap": "projected"})
    assert build([path], tap="projected")[0].tap == "projected"
    with pytest.raises(HeadError, match=r"expects 5 projected features, .* pass --tap projected"):
        build([path])


def test_a_head_of_another_encoder_is_refused_where_both_are_known(tmp_path: Path) -> None:
    samples.make_partition(7).save(tmp_path / "geocell_info.json")
    path = tmp_path / "north.safetensors"
    save_head(path, samples.make_state(7, 5), remarks={"encoder_sha256": "ab" * 32})
    with pytest.raises(HeadError, match=rf"with sha256 {'ab' * 6}, this one has {'cd' * 6}; give the encoder"):
        build([path], sha256="cd" * 32)
    assert names([path], sha256="ab" * 32) == ["north"]
    assert names([path], sha256=None) == ["north"]
    assert names([samples.write_head(tmp_path / "silent")], sha256="cd" * 32) == ["silent"]


def test_top_k_and_position_reach_every_locator(tmp_path: Path) -> None:
    heads = [samples.write_head(tmp_path / name) for name in "ab"]
    features = samples.make_features(3, 5)
    for locator in build(heads, top_k=2, position="mean"):
        located = locator.locate(features)
        assert located.topk_cell.shape == (3, 2)
        assert (located.position_deg == located.mean_deg).all()
    located = build(heads[:1])[0].locate(features)
    assert located.topk_cell.shape == (3, 5)
    assert (located.position_deg != located.mean_deg).all()


def test_locators_stand_on_the_device_of_the_run(tmp_path: Path) -> None:
    config = LocateConfig(head=(str(samples.write_head(tmp_path)),))
    (locator,) = build_locators(
        config,
        encoder_dim=5,
        encoder_tap="pooled",
        encoder_sha256=None,
        device=torch.device("meta"),
        fetch=lambda repo, filename: Path(),
    )
    assert locator.device == torch.device("meta")  # type: ignore[attr-defined]
