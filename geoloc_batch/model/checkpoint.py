"""What a Hugging Face CLIP checkpoint says about itself: config.json, the preprocessor's settings, the licence."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geoloc_batch.errors import CheckpointError
from geoloc_batch.model.activations import ACTIVATIONS

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3

# What transformers takes for a key that config.json leaves out (CLIPVisionConfig, CLIPTextConfig, CLIPConfig).
_SHARED_DEFAULTS = {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_VISION_DEFAULTS = _SHARED_DEFAULTS | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
}
_TEXT_DEFAULTS = _SHARED_DEFAULTS | {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
}
_PROJECTION_DEFAULT = 512
# Before transformers mended it, every CLIP config said 2, and the highest token id marked the end.
_LEGACY_EOS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerConfig:
    """One transformer of the two."""

    width: int
    mlp_width: int
    layers: int
    heads: int
    activation: str
    """A name of activations.ACTIVATIONS."""
    norm_eps: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipConfig:
    """The architecture of a CLIP model."""

    vision: TowerConfig
    text: TowerConfig
    image_size: int
    patch_size: int
    projection: int
    """Width of the space that both towers are projected into."""
    vocab_size: int
    context_length: int
    eos_id: int | None
    """Text is pooled at the first token of this id; None: at the highest id."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Normalization:
    """(pixel / 255 - mean) / std, a channel each."""

    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file cannot be read or holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, it holds a {type(value).__name__}")
    return value


def read_config(folder: Path) -> ClipConfig:
    """The architecture from a checkpoint's config.json, with transformers' defaults for what it leaves out.

    Raises:
        CheckpointError: the file is missing or broken, or describes something that is not a plain CLIP model.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json: give a folder with a Hugging Face CLIP checkpoint")
    config = read_json(path)
    if config.get("model_type") != "clip":
        raise CheckpointError(f"{path}: model_type is {config.get('model_type')!r}, only 'clip' can be read")
    vision = _Section(path, config, "vision_config", _VISION_DEFAULTS)
    text = _Section(path, config, "text_config", _TEXT_DEFAULTS)
    if vision.values["num_channels"] != 3:
        raise CheckpointError(f"{path}: vision_config.num_channels is {vision.values['num_channels']!r}, photos have 3")
    projection = config.get("projection_dim")
    result = ClipConfig(
        vision=vision.tower(),
        text=text.tower(),
        image_size=vision.side("image_size"),
        patch_size=vision.side("patch_size"),
        projection=_whole(path, "projection_dim", _PROJECTION_DEFAULT if projection is None else projection),
        vocab_size=text.count("vocab_size"),
        context_length=text.count("max_position_embeddings"),
        eos_id=text.eos_id(),
    )
    if result.patch_size > result.image_size:
        raise CheckpointError(
            f"{path}: vision_config.patch_size is {result.patch_size}, larger than image_size, {result.image_size}"
        )
    return result


def _whole(path: Path, name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{path}: {name} must be a whole number from 1, got {value!r}")
    return value


class _Section:
    """One part of config.json, its values checked as they are taken."""

    def __init__(self, path: Path, config: dict[str, Any], name: str, defaults: dict[str, Any]) -> None:
        self.path, self.name = path, name
        given = config.get(name) or {}
        # Old files carry vision_config_dict and text_config_dict, and transformers lets these win.
        over = config.get(f"{name}_dict")
        if not isinstance(given, dict) or not isinstance(over or {}, dict):
            raise CheckpointError(f"{path}: {name} must be a JSON object, got {given!r:.80}")
        self.values: dict[str, Any] = defaults | given if over is None else defaults | given | defaults | over

    def _refuse(self, key: str, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {self.name}.{key} must be {wanted}, got {self.values[key]!r}")

    def count(self, key: str) -> int:
        return _whole(self.path, f"{self.name}.{key}", self.values[key])

    def side(self, key: str) -> int:
        value = self.values[key]
        if isinstance(value, list) and len(value) == 2:
            if value[0] != value[1]:
                raise self._refuse(key, "square")
            self.values[key] = value[0]
        return self.count(key)

    def eos_id(self) -> int | None:
        value = self.values["eos_token_id"]
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._refuse("eos_token_id", "one token id")
        return None if value == _LEGACY_EOS else value

    def tower(self) -> TowerConfig:
        activation, eps = self.values["hidden_act"], self.values["layer_norm_eps"]
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            raise self._refuse("hidden_act", f"one of {', '.join(ACTIVATIONS)}")
        if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < math.inf:
            raise self._refuse("layer_norm_eps", "a number above 0")
        width, heads = self.count("hidden_size"), self.count("num_attention_heads")
        if width % heads:
            raise self._refuse("num_attention_heads", f"a divisor of hidden_size, {width}")
        return TowerConfig(
            width=width,
            mlp_width=self.count("intermediate_size"),
            layers=self.count("num_hidden_layers"),
            heads=heads,
            activation=activation,
            norm_eps=float(eps),
        )


def read_normalization(folder: Path, image_size: int) -> Normalization:
    """How the checkpoint's own preprocessor scales pixels; CLIP's published values where the folder has none.

    Raises:
        CheckpointError: the preprocessor makes other pixels than the stream does (shorter side to ``image_size`` by
            bicubic, centre crop, 1/255), so that the features would be others than the checkpoint's own.
    """
    path = folder / "preprocessor_config.json"
    if path.is_file():
        given = read_json(path)
    else:
        path = folder / "processor_config.json"
        given = read_json(path).get("image_processor") or {} if path.is_file() else {}
    for key in ("do_resize", "do_center_crop", "do_rescale"):
        if not given.get(key, True):
            raise CheckpointError(f"{path}: {key} is {given[key]!r}; only CLIP's own preprocessing can be reproduced")
    _expect(path, "resample", given.get("resample", BICUBIC), BICUBIC, "bicubic")
    for key, sides in (("size", {"shortest_edge"}), ("crop_size", {"height", "width"})):
        _expect(path, key, _side(given.get(key, image_size), sides), image_size, "the model's image_size")
    factor = given.get("rescale_factor", 1 / 255)
    if not isinstance(factor, int | float) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise CheckpointError(f"{path}: rescale_factor is {factor!r}, only 1/255 can be reproduced")
    if not given.get("do_normalize", True):
        return Normalization(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    mean = _channels(path, "image_mean", given.get("image_mean", OPENAI_MEAN))
    std = _channels(path, "image_std", given.get("image_std", OPENAI_STD))
    if min(std) <= 0:
        raise CheckpointError(f"{path}: image_std must be above 0, got {std}")
    return Normalization(mean=mean, std=std)


def _side(value: object, keys: set[str]) -> object:
    """The one side that a number, or an object of exactly these keys and one value, stands for; else the value."""
    if isinstance(value, dict) and set(value) == keys and len({str(side) for side in value.values()}) == 1:
        return next(iter(value.values()))
    return value


def _expect(path: Path, key: str, value: object, wanted: int, meaning: str) -> None:
    if value != wanted:
        raise CheckpointError(f"{path}: {key} is {value!r}, only {wanted} ({meaning}) can be reproduced")


def _channels(path: Path, key: str, value: object) -> tuple[float, ...]:
    if (
        not isinstance(value, list | tuple)
        or len(value) != 3
        or not all(isinstance(part, int | float) and math.isfinite(part) for part in value)
    ):
        raise CheckpointError(f"{path}: {key} must be three numbers, got {value!r}")
    return tuple(float(part) for part in value)


def read_licence(folder: Path) -> str | None:
    """`license:` of the model card's front matter (README.md), None where there is none."""
    try:
        card = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card, re.DOTALL)
    if front is None:
        return None
    fields = dict(re.findall(r"^(license|license_name):[ \t]*['\"]?([^'\"\n]+?)['\"]?[ \t]*$", front[1], re.MULTILINE))
    return fields.get("license_name") or fields.get("license")
