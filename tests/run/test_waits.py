"""How often a thread of the engine waits for the device: by one event a batch, and one fetch of what a head found."""

from __future__ import annotations

import io
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import locate_samples
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from geoloc_batch.locate.head import HeadLocator
from geoloc_batch.records import Sample, Unit, UnitEnd
from geoloc_batch.run.engine import Engine, Outputs
from geoloc_batch.run.sources import FeatureBatch
from geoloc_batch.run.telemetry import Telemetry
from geoloc_batch.run.transfer import Features
from geoloc_batch.run.workers import StopSignal
from geoloc_batch.store.ledger import Ledger

UNIT = Unit(index=0, kind="shard", source="a.tar")
aten = torch.ops.aten
# In inference mode `if tensor` stays is_nonzero, elsewhere it is taken apart.
WAITING = {aten._local_scalar_dense, aten.is_nonzero, aten.item, aten.nonzero, aten.masked_select, aten.equal}


class Waits(TorchDispatchMode):
    """Counts what would make a thread wait for a CUDA device: numbers asked of it, and sizes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), given: Any = None) -> Any:
        if function.overloadpacket in WAITING:
            self.asked.append(str(function))
        return function(*arguments, **(given or {}))


@pytest.mark.parametrize("num_photos", [200, 64])
def test_a_batch_is_waited_for_by_one_event_and_one_fetch_of_its_places(
    num_photos: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[Any] = []
    cpu, gather = Tensor.cpu, Engine._gather_batch
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: waits.append(tuple(tensor.shape)) or cpu(tensor))

    def counted(engine: Engine, *given: Any) -> None:
        # The mode holds for the lane's own thread.
        with Waits() as mode:
            gather(engine, *given)
        waits.extend(mode.asked)

    class Event:
        def wait(self) -> None:
            waits.append("event")

        landed = contextmanager(lambda _: iter([Features(features_BD.numpy(), features_BD)]))

    class Source:
        precision, wider = "fp32", None

        def features(self, units: Any, _: Telemetry) -> Any:
            unit = next(iter(units))
            rows = tuple(Sample(unit, "a.tar", row, str(row), b"") for row in range(num_photos))
            yield FeatureBatch(Event(), rows)
            yield UnitEnd(unit, num_photos)

    monkeypatch.setattr(Engine, "_gather_batch", counted)
    features_BD = locate_samples.make_features(num_photos, 48)
    head = locate_samples.head_of(locate_samples.make_state(37, 48))
    locator = HeadLocator(head, locate_samples.make_partition(37))
    telemetry = Telemetry(None, stream=io.StringIO())
    with closing(Ledger(tmp_path)) as ledger:
        ledger.open({})
        ledger.adopt_plan([UNIT])
        Engine(ledger, Outputs(embeddings=False, trees=("",)), [locator], telemetry, StopSignal()).run(Source())
        assert (ledger.totals().rows, ledger.totals().errors) == (num_photos, 0)
    assert waits == ["event", (num_photos, 2 * 5 + 4)]
