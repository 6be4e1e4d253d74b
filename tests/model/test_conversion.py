"""Hugging Face checkpoints give the features that transformers computes from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_samples as samples
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from geoloc_batch.model.clip import load_clip, mlp_ratio
from geoloc_batch.model.encoder import Encoder, load_encoder

# Relative to a feature's length, in fp32: the bar of the project is 1e-5.
TOLERANCE = 1e-5


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def check(folder: Path, model: Any) -> None:
    """Pooled, projected and text features of a checkpoint against those of the model that it was saved from."""
    clip, cpu = load_clip(str(folder)), torch.device("cpu")
    projected = Encoder(clip, tap="projected", precision="fp32", batch_size=3, compiled=False, device=cpu)
    pixels = samples.photos(3, projected.image_size)
    their_pooled, their_projected = samples.reference(model, pixels)
    assert samples.difference(projected.encode(pixels), their_projected) < TOLERANCE
    pooled = Encoder(clip, tap="pooled", precision="fp32", batch_size=3, compiled=False, device=cpu)
    assert samples.difference(pooled.encode(pixels), their_pooled) < TOLERANCE
    vocab, length = model.config.text_config.vocab_size, model.config.text_config.max_position_embeddings
    ids = torch.randint(0, vocab, (5, length), generator=torch.Generator().manual_seed(1))
    # The end stands at another place in each row, once at the very end, and what follows it is noise.
    end = vocab - 1 if model.config.text_config.eos_token_id == 2 else model.config.text_config.eos_token_id
    ids[torch.arange(5), torch.tensor([1, 4, 5, 7, length - 1])] = end
    assert samples.difference(projected.encode_text(ids), samples.reference_text(model, ids)) < TOLERANCE
    assert pooled.dim == their_pooled.shape[1]
    assert projected.dim == their_projected.shape[1]
    assert pooled.logit_scale == pytest.approx(float(model.logit_scale.exp()))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"vision": {"hidden_act": "gelu"}, "text": {"hidden_act": "gelu"}},
        {"vision": {"hidden_act": "gelu"}},
        {"vision": {"layer_norm_eps": 0.05}, "text": {"layer_norm_eps": 0.3}},
        {"text": {"eos_token_id": 2}},
        {"text": {"eos_token_id": 50}},
        {"vision": {"num_attention_heads": 1, "num_hidden_layers": 1, "image_size": 15, "patch_size": 15}},
        {"vision": {"hidden_size": 40, "num_attention_heads": 5, "intermediate_size": 39, "image_size": 64}},
    ],
    ids=[
        "quick_gelu",
        "gelu",
        "mixed activations",
        "epsilons",
        "legacy end of text",
        "end of text not the last id",
        "one patch",
        "narrow mlp",
    ],
)
def test_features_equal_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = samples.make_model(**changes)
    check(samples.save(model, tmp_path / "checkpoint"), model)


@pytest.mark.slow
def test_a_model_of_the_size_of_vit_b_32_equals_transformers_with_either_activation(tmp_path: Path) -> None:
    from transformers.activations import ACT2FN

    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    vision |= {"image_size": 224, "patch_size": 32}
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
    text |= {"vocab_size": 1000, "max_position_embeddings": 77, "eos_token_id": 999}
    # At this depth larger weights would make the tower chaotic, and any two orders of summation would differ.
    model = samples.make_model(vision=vision, text=text, projection_dim=512, spread=1.0)
    folder = samples.save(model, tmp_path / "checkpoint")
    check(folder, model)
    # The same weights once more, read with the other activation.
    for part, tower in (("vision_config", model.vision_model), ("text_config", model.text_model)):
        edit(folder / "config.json", lambda config, part=part: config[part].update(hidden_act="gelu"))
        for layer in tower.encoder.layers:
            layer.mlp.activation_fn = ACT2FN["gelu"]
    check(folder, model)


def test_sharded_safetensors_equal_transformers(tmp_path: Path) -> None:
    model = samples.make_model()
    folder = samples.save(model, tmp_path / "checkpoint", max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    check(folder, model)


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_tensors_equal_transformers(tmp_path: Path, shards: int) -> None:
    model = samples.make_model()
    check(samples.save_bin(model, tmp_path / "checkpoint", shards=shards), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_stored_in_half_are_computed_in_fp32(tmp_path: Path, dtype: torch.dtype) -> None:
    model = samples.make_model().to(dtype)
    folder = samples.save(model, tmp_path / "checkpoint")
    check(folder, model.float())


def test_a_config_of_old_with_its_doubled_parts_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    from transformers import CLIPModel

    folder = samples.save(samples.make_model(), tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config_dict"] = config["vision_config"] | {"layer_norm_eps": 0.1}
    config["vision_config"]["layer_norm_eps"] = 1e-5
    config["text_config_dict"] = None
    (folder / "config.json").write_text(json.dumps(config))
    model = CLIPModel.from_pretrained(folder).eval().requires_grad_(False)
    assert model.config.vision_config.layer_norm_eps == 0.1
    check(folder, model)


def test_a_short_row_of_tokens_equals_the_same_row_padded(tmp_path: Path) -> None:
    encoder = load_encoder(str(samples.save(samples.make_model(), tmp_path / "c")), batch_size=1, device="cpu")
    ids = torch.tensor([[97, 5, 6, 98]])
    padded = torch.tensor([[97, 5, 6, 98, 1, 1, 1]])
    assert torch.equal(encoder.encode_text(ids), encoder.encode_text(padded))


def test_strings_are_cut_into_the_tokens_of_transformers_tokenizer(tmp_path: Path) -> None:
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    from geoloc_batch.model.clip import tokenize_plain

    own = SimpleTokenizer()
    merges = sorted((pair for pair in own.bpe_ranks if len(pair) == 2), key=own.bpe_ranks.__getitem__)
    vocab = own.encoder | {"<|startoftext|>": own.sot_token_id, "<|endoftext|>": own.eot_token_id}
    vocab = {token: number for token, number in vocab.items() if token not in ("<start_of_text>", "<end_of_text>")}
    theirs = CLIPTokenizer(vocab=vocab, merges=merges)
    texts = ["A Street View photo in Côte d'Ivoire.", "  Zürich,\n 3rd   district's  rue ", "São Tomé: 12°N"]
    for text in texts:
        ids = tokenize_plain([text], 77)[0]
        expected = theirs(text)["input_ids"]
        assert ids[: len(expected)].tolist() == expected
        assert not ids[len(expected) :].any()


@given(width=st.integers(1, 5000), mlp_width=st.integers(1, 20000))
def test_any_width_of_the_mlp_survives_open_clips_ratio(width: int, mlp_width: int) -> None:
    assert int(width * mlp_ratio(width, mlp_width)) == mlp_width
