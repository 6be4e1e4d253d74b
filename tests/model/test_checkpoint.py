"""Checkpoints that are not what they claim to be: each gives one error that names the thing and the remedy."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_samples as samples
import pytest
import torch
from safetensors.torch import load_file, save_file

from geoloc_batch.errors import CheckpointError, HubError
from geoloc_batch.model.clip import load_clip
from geoloc_batch.model.config import STREETCLIP
from geoloc_batch.model.encoder import load_encoder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return samples.save(samples.make_model(), tmp_path / "checkpoint")


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def refused(folder: Path | str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        load_clip(str(folder))
    assert len(str(caught.value)) < 1200


@pytest.mark.parametrize(
    ("part", "key", "value", "words"),
    [
        ("vision_config", "hidden_act", "prelu", r"vision_config.hidden_act must be one of gelu, .*, got 'prelu'"),
        ("text_config", "hidden_act", ["gelu"], r"text_config.hidden_act must be"),
        ("vision_config", "num_channels", 4, r"num_channels is 4"),
        ("vision_config", "num_attention_heads", 5, r"must be a divisor of hidden_size, 48, got 5"),
        ("vision_config", "image_size", [30, 28], r"image_size must be square"),
        ("vision_config", "patch_size", 31, r"patch_size is 31, larger than image_size, 30"),
        ("vision_config", "num_hidden_layers", 0, r"num_hidden_layers must be a whole number from 1, got 0"),
        ("text_config", "vocab_size", "many", r"vocab_size must be a whole number from 1, got 'many'"),
        ("text_config", "layer_norm_eps", 0, r"layer_norm_eps must be a number above 0"),
        ("text_config", "eos_token_id", [1, 2], r"eos_token_id must be one token id, got \[1, 2\]"),
        ("", "model_type", "siglip", r"model_type is 'siglip', only 'clip'"),
        ("", "projection_dim", -3, r"projection_dim must be a whole number from 1, got -3"),
        ("", "projection_dim", 24, r"visual_projection.weight is \[23, 48\], not \[24, 48\]"),
        ("", "vision_config", [1], r"vision_config must be a JSON object"),
        ("vision_config", "hidden_size", 51, r"of another shape: vision_model.*and \d+ more"),
        ("vision_config", "num_hidden_layers", 3, r"16 missing: vision_model.encoder.layers.2"),
        ("text_config", "num_hidden_layers", 2, r"16 unknown: text_model.encoder.layers.2"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_key_and_value(
    folder: Path, part: str, key: str, value: object, words: str
) -> None:
    edit(folder / "config.json", lambda config: (config[part] if part else config).update({key: value}))
    refused(folder, words)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"{", "cannot be read as JSON"), (b"[1]", "must hold a JSON object"), (b"\xff\xfe", "cannot be read as JSON")],
)
def test_a_config_that_is_no_json_object_is_refused(folder: Path, content: bytes, words: str) -> None:
    (folder / "config.json").write_bytes(content)
    refused(folder, words)


def test_every_tensor_is_accounted_for(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["vision_model.extra"] = tensors.pop("vision_model.post_layernorm.bias")
    tensors["visual_projection.weight"] = torch.zeros(48, 23)
    tensors["text_model.embeddings.position_ids"] = torch.arange(13)
    save_file(tensors, file)
    refused(
        folder,
        r"1 missing: vision_model.post_layernorm.bias. 1 unknown: vision_model.extra. "
        r"1 of another shape: visual_projection.weight is \[48, 23\], not \[23, 48\]$",
    )


def test_a_truncated_or_foreign_safetensors_file_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for content in (whole[:-100], whole[:5], b"", b"x" * 100):
        file.write_bytes(content)
        refused(folder, "is damaged or no safetensors file.*fetch or copy it again")


def test_quantised_weights_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()}, file)
    refused(folder, "is stored as torch.int8")


class Trap:
    """Unpickled, it would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


def test_a_pickle_with_code_inside_is_refused_and_not_run(tmp_path: Path) -> None:
    folder = samples.save_bin(samples.make_model(), tmp_path / "checkpoint")
    sprung = tmp_path / "sprung"
    torch.save({"logit_scale": torch.ones(()), "trap": Trap(sprung)}, folder / "pytorch_model.bin")
    refused(folder, "A pickle can run code.*convert it to model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(sprung)))
    refused(folder, "pytorch_model.bin")
    assert not sprung.exists()


def test_torchs_advice_to_load_a_pickle_unsafely_is_never_passed_on(tmp_path: Path) -> None:
    folder = samples.save_bin(samples.make_model(), tmp_path / "checkpoint")
    file = folder / "pytorch_model.bin"
    reasons = []
    torch.save({"trap": Trap(tmp_path / "sprung")}, file)
    for content in (file.read_bytes(), pickle.dumps(Trap(tmp_path / "sprung")), b"not a pickle at all", b""):
        file.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            load_clip(str(folder))
        reasons.append(str(caught.value))
    file.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(CheckpointError) as caught:
        load_clip(f"open_clip:ViT-B-32:{file}")
    reasons.append(str(caught.value))
    for reason in reasons:
        assert "\n" not in reason
        for advice in ("weights_only", "likely succeed", "you have two options"):
            assert advice not in reason
    # What is wrong is still said.
    assert "Unsupported global: GLOBAL getattr was not an allowed global" in reasons[0]
    assert "Unsupported operand" in reasons[2]


def test_a_pickle_that_is_cut_or_holds_something_else_is_refused(tmp_path: Path) -> None:
    folder = samples.save_bin(samples.make_model(), tmp_path / "checkpoint")
    file = folder / "pytorch_model.bin"
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a pickle at all"):
        file.write_bytes(content)
        refused(folder, "damaged")
    torch.save({"epoch": 3}, file)
    refused(folder, "must hold tensors by name and nothing else")


def test_missing_weights_and_missing_shards_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(tmp_path / "aside")
    refused(folder, "has no weights: looked for model.safetensors, ")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"logit_scale": "a.safetensors"}}))
    refused(folder, "names 1 shards that are not there: a.safetensors")
    index.write_text(json.dumps({"weight_map": {"logit_scale": "../aside"}}))
    refused(folder, "not a plain file name")
    index.write_text("{}")
    refused(folder, "is no index of sharded weights")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./nowhere", "no such folder"),
        ("/no/such/folder", "no such folder"),
        ("a/b/c", "no such folder"),
        ("owner/name/", "no such folder"),
        ("StreetCLIP", "is of no known kind and no folder; give a checkpoint folder, a hub id"),
        ("models/clip.safetensors", "is a file; give the folder"),
        ("owner/name@", "no such folder"),
        ("owner/na--me", "is no hub id"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused_with_the_forms(name: str, words: str) -> None:
    refused(name, words)


def test_a_file_is_refused_with_the_folder_as_remedy(folder: Path) -> None:
    refused(folder / "config.json", "is a file; give the folder that holds config.json")


def test_the_hash_is_that_of_the_file_and_the_fingerprint_sees_the_config(folder: Path) -> None:
    first = load_clip(str(folder))
    assert first.sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    edit(folder / "config.json", lambda config: config["vision_config"].update(hidden_act="gelu"))
    second = load_clip(str(folder))
    assert second.sha256 == first.sha256
    assert second.fingerprint != first.fingerprint


def test_loaded_weights_outlive_their_file(folder: Path) -> None:
    encoder = load_encoder(str(folder), batch_size=2, device="cpu")
    pixels = samples.photos(2, 30)
    before = encoder.encode(pixels)
    (folder / "model.safetensors").write_bytes(b"")
    assert torch.equal(encoder.encode(pixels), before)


PREPROCESSOR = {
    "crop_size": {"height": 30, "width": 30},
    "size": {"shortest_edge": 30},
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.25, 0.3],
    "resample": 3,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
}


@pytest.mark.parametrize("form", ["preprocessor_config.json", "processor_config.json", "plain numbers"])
def test_the_checkpoints_own_mean_and_std_are_used(folder: Path, form: str) -> None:
    settings = PREPROCESSOR | ({"crop_size": 30, "size": 30} if form == "plain numbers" else {})
    if form == "processor_config.json":
        (folder / form).write_text(json.dumps({"image_processor": settings}))
    else:
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    encoder = load_encoder(str(folder), batch_size=2, device="cpu", precision="fp32")
    pixels = samples.photos(2, 30)
    mean, std = (torch.tensor(PREPROCESSOR[key])[:, None, None] for key in ("image_mean", "image_std"))
    with torch.no_grad():
        expected = samples.make_model().vision_model(pixel_values=(pixels / 255 - mean) / std).pooler_output
    assert samples.difference(encoder.encode(pixels), expected) < 1e-5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": {"shortest_edge": 32}}, r"size is {'shortest_edge': 32}|size is 32, only 30"),
        ({"size": {"height": 30, "width": 30}}, "size is {'height': 30, 'width': 30}, only 30"),
        ({"crop_size": {"height": 30, "width": 28}}, "crop_size is"),
        ({"resample": 2}, "resample is 2, only 3"),
        ({"do_center_crop": False}, "do_center_crop is False"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0"),
        ({"image_mean": [0.5]}, "image_mean must be three numbers"),
        ({"image_std": [0.5, 0.5, 0.0]}, "image_std must be above 0"),
    ],
)
def test_preprocessing_that_the_stream_does_not_do_is_refused(folder: Path, change: dict[str, Any], words: str) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR | change))
    refused(folder, words)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: cc-by-nc-4.0\nlanguage:\n- en\n---\n# Card", "cc-by-nc-4.0"),
        ("---\r\nlanguage: en\r\nlicense: 'mit'\r\n---\r\n", "mit"),
        ("---\nlicense: other\nlicense_name: house-rules\n---\n", "house-rules"),
        ("# license: mit\n", None),
    ],
)
def test_the_licence_comes_from_the_model_card(folder: Path, card: str, licence: str | None) -> None:
    (folder / "README.md").write_bytes(card.encode())
    encoder = load_encoder(str(folder), batch_size=1, device="cpu")
    assert encoder.licence == licence
    assert encoder.summary().endswith(f"licence {licence or 'not stated'}")


def test_a_mistyped_path_below_a_folder_that_is_here_is_not_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []

    def fetch(repo: str, revision: str | None) -> Path:
        asked.append(repo)
        raise HubError(repo)

    monkeypatch.setattr("geoloc_batch.model.clip.fetch_checkpoint", fetch)
    for folder in ("checkpoints/street", "geolocal", "empty"):
        (tmp_path / folder).mkdir(parents=True)
    refused("checkpoints/stret", "no such folder, although checkpoints is one; did you mean checkpoints/street?")
    refused("empty/nosuch", "--encoder empty/nosuch: no such folder.* pass empty/nosuch@main")
    assert asked == []
    # The default is known to be the hub's, and so is whatever names a revision or an owner that is no folder.
    for encoder in (STREETCLIP, "checkpoints/stret@main", "acme/clip"):
        with pytest.raises(HubError):
            load_clip(encoder)
    assert asked == [STREETCLIP, "checkpoints/stret", "acme/clip"]
