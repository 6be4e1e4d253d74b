"""Downloads, against a local server that speaks as a hub does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import model_samples as samples
import pytest
import torch
from hub_server import COMMIT, Hub, serving

from geoloc_batch.errors import CheckpointError
from geoloc_batch.model.config import STREETCLIP
from geoloc_batch.model.encoder import load_encoder
from geoloc_batch.model.hub import STREETCLIP_REVISION, shards_of, split_hub_id


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    model = samples.make_model()
    plain = samples.save(model, root / "plain")
    (plain / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    sharded = samples.save(model, root / "sharded", max_shard_size="60KB")
    pickled = samples.save_bin(model, root / "pickled")
    empty = root / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    with serving() as server:
        server.repos = {
            "acme/plain": (plain, COMMIT),
            "acme/sharded": (sharded, COMMIT),
            "acme/empty": (empty, COMMIT),
            STREETCLIP: (pickled, STREETCLIP_REVISION),
        }
        server.gated, server.broken = {"acme/gated"}, {"acme/broken"}
        yield server


# Runs one call per line of its arguments and prints what came of each as JSON. The hub's settings are read at import,
# so that they need a process of their own.
PROGRAM = """
import json, sys, time
time.sleep = lambda seconds: None  # the waits between huggingface_hub's retries
from geoloc_batch.errors import GeolocError
from geoloc_batch.model.hub import fetch, fetch_checkpoint, split_hub_id
def load(encoder):
    from geoloc_batch.model.encoder import load_encoder
    import torch
    torch.manual_seed(len(encoder))
    e = load_encoder(encoder, batch_size=2, device="cpu")
    pixels = torch.arange(2 * 3 * e.image_size**2).remainder(251).to(torch.uint8)
    feature = e.encode(pixels.reshape(2, 3, e.image_size, e.image_size))
    return [e.name, e.sha256, e.licence, feature.double().sum().item().hex()]
def folder(encoder):
    found = fetch_checkpoint(*split_hub_id(encoder))
    return [found.name, sorted(path.name for path in found.iterdir())]
calls = {"load": load, "folder": folder, "fetch": lambda repo, file: str(fetch(repo, file))}
for call, *arguments in json.loads(sys.argv[1]):
    try:
        print(json.dumps(calls[call](*arguments)))
    except GeolocError as error:
        print(json.dumps([type(error).__name__, str(error)]))
assert ("torch" in sys.modules) == any(call == "load" for call, *_ in json.loads(sys.argv[1]))
"""


def run(calls: list[list[str]], home: Path, **environment: str) -> list[list[str]]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    clean |= {"HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_ETAG_TIMEOUT": "2", "NO_PROXY": "*"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(calls)], capture_output=True, text=True, env=clean | environment
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the hub that the tests of this module share, in their order."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def loaded(hub: Hub, home: Path) -> tuple[list[list[str]], list[str]]:
    """What loading the default encoder and the demo in a process of its own gave, and what the hub was asked."""
    hub.requests.clear()
    return run([["load", STREETCLIP], ["load", "demo"]], home, HF_ENDPOINT=hub.url), list(hub.requests)


def test_the_default_encoder_comes_from_its_pinned_commit_with_hash_and_licence(
    hub: Hub, loaded: tuple[list[list[str]], list[str]]
) -> None:
    (street, _), requests = loaded
    pickled = (hub.repos[STREETCLIP][0] / "pytorch_model.bin").read_bytes()
    name = f"{STREETCLIP}@{STREETCLIP_REVISION}"
    assert street[:3] == [name, hashlib.sha256(pickled).hexdigest(), "CC-BY-NC 4.0"]
    asked = [line for line in requests if "/resolve/" in line]
    assert asked
    assert all(f"/{STREETCLIP}/resolve/{STREETCLIP_REVISION}/" in line for line in asked)


def test_the_demo_encoder_is_the_same_in_another_process(loaded: tuple[list[list[str]], list[str]]) -> None:
    name, sha256, licence, total = loaded[0][1]
    demo = load_encoder("demo", batch_size=2, device="cpu")
    pixels = torch.arange(2 * 3 * 56 * 56).remainder(251).to(torch.uint8).reshape(2, 3, 56, 56)
    assert (name, sha256, licence) == ("demo", demo.sha256, None)
    assert total == demo.encode(pixels).double().sum().item().hex()
    # The same on every machine: uniform numbers and two roundings, nothing that a processor may do in its own way.
    assert sha256.startswith("3c153a4aea4f6b1c")


def test_a_checkpoint_is_fetched_once_and_then_found_without_the_network(
    hub: Hub, home: Path, loaded: tuple[list[list[str]], list[str]]
) -> None:
    calls = [["folder", STREETCLIP], ["folder", "acme/plain"], ["folder", f"acme/sharded@{COMMIT}"]]
    calls += [["fetch", "acme/plain", "config.json"]]
    hub.requests.clear()
    online = run(calls, home, HF_ENDPOINT=hub.url)
    street, plain, sharded, fetched = online
    assert street == [STREETCLIP_REVISION, ["config.json", "pytorch_model.bin"]]
    assert not [line for line in hub.requests if STREETCLIP in line]
    assert plain == [COMMIT, ["README.md", "config.json", "model.safetensors"]]
    assert sharded[0] == COMMIT
    assert {"config.json", "model.safetensors.index.json"} < set(sharded[1])
    assert len([name for name in sharded[1] if name.startswith("model-000")]) > 2
    assert Path(fetched).read_bytes() == (hub.repos["acme/plain"][0] / "config.json").read_bytes()

    hub.requests.clear()
    cold = [["folder", "acme/other"], ["fetch", "acme/plain", "best.pt"]]
    offline = run(calls + cold, home, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert offline[:4] == online
    assert hub.requests == []
    for kind, message in offline[4:]:
        assert kind == "HubError"
        assert "HF_HUB_OFFLINE is set" in message
        assert "hf download acme/" in message
        assert "HF_HOME" in message
        assert str(home) in message

    # Nothing listens at this address, yet what is in the cache is used.
    gone = run([*calls[:2], ["folder", "acme/other"]], home, HF_ENDPOINT="http://127.0.0.1:9")
    assert gone[:2] == online[:2]
    assert gone[2][0] == "HubError"
    assert "the hub gave no answer" in gone[2][1]
    assert "config.json of acme/other@main from http://127.0.0.1:9" in gone[2][1]


def test_a_hub_that_refuses_is_quoted_with_the_remedy(hub: Hub, tmp_path: Path) -> None:
    calls = [
        ["folder", "acme/gated"],
        ["folder", "acme/none"],
        ["folder", "acme/plain@v9"],
        ["folder", "acme/empty"],
        ["fetch", "acme/plain", "heads/best.pt"],
    ]
    gated, none, revision, empty, file = run(calls, tmp_path, HF_ENDPOINT=hub.url)
    assert gated[0] == none[0] == revision[0] == file[0] == "HubError"
    for message in (gated[1], none[1]):
        assert "access refused (HTTP 401)" in message
        assert "HF_TOKEN" in message
    assert "acme/plain@v9" in revision[1]
    assert "no such revision" in revision[1]
    assert empty[0] == "CheckpointError"
    assert "has no weights: looked for model.safetensors" in empty[1]
    assert "heads/best.pt of acme/plain@main" in file[1]
    assert "no such file" in file[1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (STREETCLIP, (STREETCLIP, STREETCLIP_REVISION)),
        (f"{STREETCLIP}@main", (STREETCLIP, "main")),
        ("openai/clip-vit-base-patch32", ("openai/clip-vit-base-patch32", None)),
        ("acme/a.b_c@refs/pr/1", ("acme/a.b_c", "refs/pr/1")),
        ("acme/name@", None),
        ("./name", None),
        ("a/b/c", None),
        ("name", None),
    ],
)
def test_hub_ids_are_told_from_paths(text: str, expected: tuple[str, str | None] | None) -> None:
    assert split_hub_id(text) == expected


def test_an_index_may_not_name_files_elsewhere(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "b.safetensors", "c": "a.safetensors", "d": "b.safetensors"}}))
    assert shards_of(index) == ["a.safetensors", "b.safetensors"]
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        shards_of(index)
