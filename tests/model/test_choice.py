"""What is chosen by measurement: who is timed and how, what is remembered, and that a CPU chooses nothing."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import model_samples as samples
import pytest
import torch
from torch import Tensor

from geoloc_batch.errors import ConfigError
from geoloc_batch.model import choice, settling
from geoloc_batch.model import encoder as encoder_module
from geoloc_batch.model import warmup as warmup_module
from geoloc_batch.model.attention import AttentionShape, check_sdpa
from geoloc_batch.model.checkpoint import Normalization
from geoloc_batch.model.choice import MODES, choice_file, choose_mode, choose_sdpa, medians, stopwatch
from geoloc_batch.model.chunks import Chunks
from geoloc_batch.model.compiled import CompiledTower
from geoloc_batch.model.config import EncoderConfig, WarmupConfig
from geoloc_batch.model.encoder import Encoder, load_encoder
from geoloc_batch.model.tower import attention_shape
from geoloc_batch.model.vit import PlainViT
from geoloc_batch.model.warmup import warm_up

CPU = torch.device("cpu")
SHAPE = AttentionShape(num_heads=3, num_tokens=17, head_width=8, dtype=torch.float32)


def clock(*values: float) -> tuple[Callable[[Callable[[], object]], float], Iterator[float]]:
    """A stopwatch that runs the work and then says what it was told to."""
    told = iter(values)

    def seconds(work: Callable[[], object]) -> float:
        work()
        return next(told)

    return seconds, told


def test_contenders_are_timed_in_turns_and_who_does_not_run_is_left_out() -> None:
    order: list[str] = []

    def fail() -> None:
        raise RuntimeError("no kernel image")

    contenders = {"a": lambda: order.append("a"), "none": fail, "b": lambda: order.append("b")}
    # A call of each to warm up; one round of a slow machine must not count more than the others.
    seconds, told = clock(9, 9, *[1, 2] * 4, 50, 2, *[1, 2] * 4)
    assert medians(contenders, seconds, budget_s=60) == {"a": 1, "b": 2}
    assert order == ["a", "b"] * 10
    assert next(told, None) is None
    # A budget that is spent ends it after a round.
    assert medians(contenders, clock(9, 9, 3, 4)[0], budget_s=0) == {"a": 3, "b": 4}


@pytest.mark.parametrize(("times", "expected"), [([3.0, 1.0], "math"), ([1.0, 3.0], "flash")])
def test_the_fastest_backend_that_runs_here_is_taken(times: list[float], expected: str) -> None:
    # Of the four a CPU has flash and math, in this order.
    assert choose_sdpa(SHAPE, device=CPU, batch_size=2, seconds=clock(*times * 10)[0]) == expected
    assert choose_sdpa(None, device=CPU) == "default"


def test_backends_are_really_run_and_timed_at_the_towers_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load_encoder("demo", batch_size=2, device="cpu", precision="bf16")
    shape = attention_shape(encoder.tower)
    assert shape == AttentionShape(num_heads=3, num_tokens=17, head_width=64, dtype=torch.bfloat16)
    seen: list[tuple[int, ...]] = []
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        "geoloc_batch.model.attention.scaled_dot_product_attention",
        lambda query, key, value: seen.append((*query.shape, *key.shape)) or real(query, key, value),
    )
    before = torch.random.get_rng_state()
    monkeypatch.setattr(choice, "_BUDGET_S", 0.0)
    assert choose_sdpa(shape, device=CPU, batch_size=100) in {"flash", "math"}
    assert torch.equal(torch.random.get_rng_state(), before), "the user's random numbers go on as they were"
    assert {shape[:4] for shape in seen} == {(64, 3, 17, 64), (64, 3, 1, 64)}
    assert stopwatch(CPU)(lambda: None) >= 0


@pytest.mark.parametrize(
    ("default", "tuned", "expected"),
    [(1.0, 0.9, MODES[1]), (1.0, 0.995, "default"), (1.0, 1.2, "default")],
)
def test_a_mode_that_compiles_for_minutes_must_gain_something(default: float, tuned: float, expected: str) -> None:
    contenders = {mode: lambda: None for mode in MODES}
    mode, found = choose_mode(contenders, clock(*[default, tuned] * 10)[0])
    assert (mode, found) == (expected, {"default": default, MODES[1]: tuned})


def test_a_mode_that_does_not_run_leaves_the_other() -> None:
    def fail() -> None:
        raise RuntimeError("out of resources")

    assert choose_mode({"default": lambda: None, MODES[1]: fail}, clock(*[1.0] * 10)[0])[0] == "default"
    assert choose_mode({"default": fail, MODES[1]: lambda: None}, clock(*[1.0] * 10)[0])[0] == MODES[1]


def test_on_a_cpu_nothing_is_timed_and_torch_chooses_attention_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "medians", None)
    monkeypatch.setattr(settling, "choose_sdpa", None)
    encoder = load_encoder("demo", batch_size=2, device="cpu", compile="on")
    assert (encoder.sdpa, encoder.compile_mode) == ("default", "default")
    assert "compiled: default" in encoder.summary()
    assert "attention" not in encoder.summary()


def test_a_given_backend_computes_attention_in_an_eager_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = samples.photos(2, 56)
    exact = load_encoder("demo", batch_size=2, device="cpu", precision="fp32").encode(pixels)
    for name, is_flash in (("flash", True), ("math", False)):
        encoder = load_encoder("demo", batch_size=2, device="cpu", precision="fp32", sdpa=name)  # type: ignore[arg-type]
        forward, seen = encoder.tower.forward, []

        def watched(pixels: Tensor, forward: Any = forward, seen: list[bool] = seen) -> Any:
            seen.append(torch.backends.cuda.flash_sdp_enabled())
            return forward(pixels)

        monkeypatch.setattr(encoder.tower, "forward", watched)
        assert samples.difference(encoder.encode(pixels), exact) < 1e-5
        encoder.try_out(1)
        assert seen == [is_flash] * 2
        assert f"fp32, attention by {name})" in encoder.summary()
        assert encoder.at_precision("bf16").sdpa == name
        assert torch.backends.cuda.flash_sdp_enabled()
    half = load_encoder("demo", batch_size=2, device="cpu", precision="bf16", sdpa="math")
    assert (half.at_precision("fp16").sdpa, half.at_precision("fp32").sdpa) == ("math", "default")


def tiny_tower() -> PlainViT:
    from open_clip.transformer import VisionTransformer

    sides: dict[str, Any] = {"image_size": 6, "patch_size": 2, "width": 16, "layers": 2, "heads": 2, "mlp_ratio": 2.0}
    torch.manual_seed(5)
    return PlainViT(
        VisionTransformer(**sides, output_dim=8), Normalization(), is_projected=False, dtype=torch.float32
    ).eval()


def tiny_pixels(batch_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    return torch.randint(0, 256, (batch_size, 6, 6, 3), dtype=torch.uint8, generator=generator)


def test_a_compiled_graph_keeps_the_backend_that_it_was_made_with(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.backends.common import aot_autograd

    graphs: list[set[str]] = []

    def keep(graph: Any, _: Any) -> Any:
        graphs.append({str(node.target) for node in graph.graph.nodes if "attention" in str(node.target)})
        return graph.forward

    backend = aot_autograd(fw_compiler=keep, inference_compiler=keep)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    tower, pixels = tiny_tower(), tiny_pixels(2)
    with torch.inference_mode():
        for name in ("flash", "math"):
            torch._dynamo.reset()
            run = CompiledTower(tower, sdpa=name, mode="default")
            first = run(pixels)
            # Outside the context that stood around the first call.
            assert torch.equal(run(pixels), first)
            assert samples.difference(first, tower(pixels)) < 1e-5
    assert [any("flash" in target for target in graph) for graph in graphs] == [True, False]


def test_a_process_may_compile_more_towers_than_dynamo_allows_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []

    def note(graph: Any, _: Any) -> Any:
        limits.append(torch._dynamo.config.recompile_limit)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=note))
    torch._dynamo.reset()
    tower, allowed = tiny_tower(), torch._dynamo.config.recompile_limit
    runs: dict[int, Any] = {size: CompiledTower(tower, sdpa="default", mode="default") for size in range(1, 4)}
    # bf16 is compiled in a thread of its own, for which torch has settings of its own.
    runs[8] = Chunks(CompiledTower(tower, sdpa="default", mode="default"), size=4, num_threads=1)
    with torch.inference_mode(), torch._dynamo.config.patch(recompile_limit=2):
        for size, run in [*runs.items(), *runs.items()]:
            assert samples.difference(run(tiny_pixels(size)), tower(tiny_pixels(size))) < 1e-5
    assert limits == [256] * 4
    assert torch._dynamo.config.recompile_limit == allowed


def test_backends_that_do_not_run_here_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--sdpa cudnn does not run on cpu in torch.float32 \(.*\); pass --sdpa"):
        load_encoder("demo", batch_size=2, device="cpu", precision="fp32", sdpa="cudnn")
    with pytest.raises(ConfigError, match="--sdpa math is for plain image transformers, this encoder is of another"):
        check_sdpa("math", None, CPU)
    with pytest.raises(ConfigError, match="--compile-mode max-autotune-no-cudagraphs has no part in --compile off"):
        EncoderConfig(compile="off", compile_mode="max-autotune-no-cudagraphs")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A CPU where things are chosen by measurement, as on CUDA; gives the modes that towers were compiled in."""
    modes: list[str] = []

    def compiled(tower: Any, *, mode: str, **_: Any) -> Any:
        modes.append(mode)
        return tower

    monkeypatch.setattr(torch, "compile", compiled)
    for module in (encoder_module, warmup_module):
        monkeypatch.setattr(module, "is_measured", lambda _: True)
    monkeypatch.setattr(settling, "choose_sdpa", lambda *_, **__: "flash")
    return modes


def test_a_warm_up_compares_modes_and_later_processes_take_what_it_chose(tmp_path: Path, measured: list[str]) -> None:
    options: dict[str, Any] = {"batch_size": 2, "precision": "fp32", "compile_cache": str(tmp_path)}
    config = WarmupConfig(encoder=EncoderConfig(encoder="demo", **options))
    seconds = clock(*[0.3, 0.2] * 10)[0]
    done = warm_up(config, device="cpu", seconds=seconds)
    assert (done.compile_mode, done.sdpa, done.was_warm) == (MODES[1], "flash", False)
    assert done.milliseconds == {"default": 300, MODES[1]: 200}
    again = warm_up(config, device="cpu", seconds=None)
    assert (again.compile_mode, again.was_warm, again.milliseconds) == (MODES[1], True, {})

    def loaded(**how: Any) -> Encoder:
        return load_encoder("demo", device="cpu", compile="on", **options | how)

    assert loaded().compile_mode == MODES[1]
    assert str(loaded().graph_folder()) == done.compile_cache
    assert loaded(batch_size=3).compile_mode == "default"
    assert loaded(compile_mode="default").compile_mode == "default"
    # A backend that somebody asks for is another case, and no choice for the others.
    assert (loaded(sdpa="math").sdpa, loaded(sdpa="math").compile_mode) == ("math", "default")
    asked = WarmupConfig(encoder=EncoderConfig(encoder="demo", sdpa="math", **options))
    assert warm_up(asked, device="cpu", seconds=clock(*[0.3, 0.2] * 10)[0]).sdpa == "math"
    assert (loaded(sdpa="math").compile_mode, loaded().sdpa) == (MODES[1], "flash")
    file = choice_file(tmp_path, loaded().graph_facts(), asked="auto")
    kept = json.loads(file.read_text())
    assert kept["choice"] == {"sdpa": "flash", "compile_mode": MODES[1]}
    for damage in ("{", "[]", json.dumps(kept | {"choice": {"sdpa": "flash", "compile_mode": "fast"}})):
        file.write_text(damage)
        assert loaded().compile_mode == "default"
