"""The training loop: epochs of batches, a look at val after each, the best state kept.

State is what a checkpoint holds: weights, AdamW's moments, counters, the best weights so far, and the history. All
else follows from the settings and the epoch's number.

Shape letters: L places, N training places, B places of a batch, C cells, D features.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geoloc_batch.errors import GeolocError
from geoloc_batch.geo.metrics import Metrics
from geoloc_batch.geo.partition import Partition
from geoloc_batch.geo.sphere import unit_vectors
from geoloc_batch.train.batches import Buffers, epoch_batches, num_batches
from geoloc_batch.train.config import FitConfig, LossConfig, Position
from geoloc_batch.train.features import Features, moments
from geoloc_batch.train.group import ALONE, Group
from geoloc_batch.train.losses import HeadLoss, inverse_frequency
from geoloc_batch.train.network import Network, first_state, learning_rate
from geoloc_batch.train.scores import POSITIONS, Scores, Truth, rank, score
from geoloc_batch.train.split import LEFT_OUT, SPLITS

_LEAST_BATCH, _LARGEST_BATCH, _LEAST_STEPS = 32, 1024, 16
# Steps after which a rank looks at what the others told it: a look waits for the GPU.
_LOOK_EVERY = 16


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Task:
    """What is to be learned: L places with their features, cells and splits."""

    features: Features
    point_deg_L2: NDArray[np.float64]
    """[L, 2] (lat, lon) in degrees."""
    cell_L: NDArray[np.int64]
    """[L] the row of each place's cell."""
    split_L: NDArray[np.int8]
    """[L] as `split_places` gives it."""
    partition: Partition

    @property
    def used_L(self) -> NDArray[np.int8]:  # noqa: N802
        """[L] the splits, places left out whose features are no numbers."""
        return np.where(self.features.is_good_L, self.split_L, np.int8(LEFT_OUT))

    def places_of(self, split: str) -> NDArray[np.int64]:
        """Numbers of a split's places that have features."""
        return np.flatnonzero(self.used_L == SPLITS.index(split))

    def truth_of(self, split: str) -> Truth:
        """What is true of a split's places."""
        place_N = self.places_of(split)
        centroid_deg_C2 = self.partition.centroids_deg
        return Truth(
            place_N,
            self.point_deg_L2[place_N],
            self.cell_L[place_N],
            centroid_deg_C2,
            torch.from_numpy(unit_vectors(centroid_deg_C2)).float().to(self.features.device),
        )


@dataclass(eq=False, kw_only=True, slots=True)
class State:
    """All that an interrupted training needs to go on."""

    epoch: int = 0
    """Epochs that are done."""
    head: dict[str, Tensor]
    optimizer: dict[str, Any] = field(default_factory=dict)
    """AdamW's state_dict; empty before the first epoch."""
    best: dict[str, Tensor] = field(default_factory=dict)
    """The head of the best epoch."""
    best_epoch: int = 0
    """From 1; 0 where the first head, a warm start's, is the best, and before the first epoch."""
    best_rank: tuple[float, float] = (-math.inf, -math.inf)
    position: Position = "top1"
    """The position that chose the best epoch."""
    least_km: float = math.inf
    """The smallest median on val so far."""
    better_epoch: int = 0
    """The last epoch that was better in rank or median."""
    history: list[dict[str, float]] = field(default_factory=list)
    """One row of figures for each epoch; that of epoch 0, a warm start's head, has none of training."""
    features_sha256: str = ""
    """Of the features that it was trained on."""

    def is_over(self, config: FitConfig) -> bool:
        """Whether all epochs are done, or patience is at its end."""
        return self.epoch >= config.epochs or self.epoch - self.better_epoch >= config.patience


def first_head(task: Task, *, is_standard: bool) -> dict[str, Tensor]:
    """A head that finds all cells alike; LayerNorm's scale and shift standardise the training places, or do nothing."""
    dim = task.features.dim
    mean_D, deviation_D = torch.zeros(dim), torch.ones(dim)
    if is_standard:
        mean_D, deviation_D = moments(task.features, task.places_of("train"))
    return first_state(len(task.partition), deviation_D, mean_D)


def fit(
    task: Task,
    config: FitConfig,
    loss: LossConfig,
    state: State,
    *,
    seed: int,
    precision: str,
    is_first_judged: bool = False,
    after_epoch: Callable[[State], None] = lambda state: None,
    is_stopped: Callable[[], bool] = lambda: False,
    group: Group = ALONE,
) -> State | None:
    """Train from `state` on until all epochs are done or patience ends.

    Ranks that train together must all be given the same; they end with the same state, or all with None.

    Args:
        task: features, cells and splits.
        config: of the training.
        loss: which one.
        state: a new one with its first head, or that of a checkpoint; it is updated.
        seed: of order and dropout.
        precision: of the matrix products, fp32 or bf16.
        is_first_judged: the first head is a candidate like that of every epoch: epoch 0.
        after_epoch: is given the state after each epoch, for the checkpoint.
        is_stopped: asked before each batch; when it is true, in any rank, the epoch is given up.
        group: the ranks.

    Returns:
        The state at the end; None where training was stopped before.

    Raises:
        GeolocError: the loss, a weight or an answer is no number any more.
    """
    device = task.features.device
    network = Network(state.head, device, precision=precision, weight_decay=config.weight_decay)
    if state.optimizer:
        network.optimizer.load_state_dict(state.optimizer)
    validation = task.truth_of("val")

    def judge(figures: dict[str, float], start: float) -> None:
        _take_down(state, network, score(network, task.features, validation, group), config, figures, start)
        after_epoch(state)

    epoch = _Epoch(task, config, loss, network, seed, group)
    if is_first_judged and not state.history:
        judge({}, time.monotonic())
    while not state.is_over(config):
        start = time.monotonic()
        figures = epoch.run(state.epoch, is_stopped)
        if figures is None:
            return None
        state.epoch += 1
        judge(figures, start)
    return state


def batch_size(config: FitConfig, num_places: int) -> int:
    """Places per step, `auto` resolved for so many training places."""
    if config.batch_size != "auto":
        return config.batch_size
    return max(_LEAST_BATCH, min(_LARGEST_BATCH, num_places // _LEAST_STEPS))


def evaluate(task: Task, head: Mapping[str, Tensor], split: str, group: Group = ALONE) -> Scores:
    """The scores of a head on a split; all ranks of a group must ask."""
    network = Network(head, task.features.device, precision="fp32", weight_decay=0.0)
    return score(network, task.features, task.truth_of(split), group)


class _Epoch:
    """What the epochs of one training share."""

    def __init__(
        self, task: Task, config: FitConfig, loss: LossConfig, network: Network, seed: int, group: Group
    ) -> None:
        device = task.features.device
        self._group = group
        self._look_every = 1 if device.type == "cpu" else _LOOK_EVERY
        self._features, self._config, self._network, self._seed = task.features, config, network, seed
        self._place_N = task.places_of("train")
        self._batch_size = batch_size(config, len(self._place_N))
        self._steps = num_batches(len(self._place_N), self._batch_size)
        self._cell_L = torch.from_numpy(task.cell_L).to(device)
        self._xyz_L3 = torch.from_numpy(unit_vectors(task.point_deg_L2)).float().to(device)
        weight_C = None
        if loss.kind.startswith("weighted"):
            weight_C = inverse_frequency(task.cell_L[self._place_N], len(task.partition))
        self._loss = HeadLoss(
            loss.kind,
            torch.from_numpy(unit_vectors(task.partition.centroids_deg)),
            weight_C,
            lam=loss.lam,
            label_smoothing=loss.smoothing,
            tau_km=loss.tau_km,
            is_normalised=loss.is_normalised,
        )
        self._buffers = Buffers(device)

    def run(self, epoch: int, is_stopped: Callable[[], bool]) -> dict[str, float] | None:
        """One pass over the training places: the mean loss, its parts and the last rate; None where it was stopped."""
        config, network = self._config, self._network
        totals: dict[str, Tensor] = {}
        rate = 0.0
        batches = epoch_batches(
            self._features,
            self._place_N,
            seed=self._seed,
            epoch=epoch,
            batch_size=self._batch_size,
            dropout=config.dropout,
            view_dropout=config.view_dropout,
            buffers=self._buffers,
            group=self._group,
        )
        for step, batch in enumerate(batches, start=epoch * self._steps):
            is_asked = is_stopped()
            if is_asked and self._group.size == 1:
                return None
            rate = learning_rate(
                step, config.epochs * self._steps, round(config.warmup_epochs * self._steps), config.lr
            )
            loss, parts, grad_BC = self._loss.value_and_grad(
                network.logits(batch),
                self._cell_L[batch.place_B],
                self._xyz_L3[batch.place_B],
                self._cell_L[batch.all_place],
            )
            network.backward(batch, grad_BC)
            figures = {"loss": loss, **parts}
            if self._group.size > 1:
                figures = self._summed(figures, is_asked=is_asked)
                if step % self._look_every == 0 and bool(network.told_K[-1]):
                    return None
            network.step(rate)
            # Summed where they are: a look at each would wait for the device.
            for name, value in figures.items():
                totals[name] = totals.get(name, 0.0) + value.double() * len(batch.all_place)
        means = {name: float(total) / len(self._place_N) for name, total in totals.items()}
        # The loss is that of the weights before the last step.
        if not (math.isfinite(means["loss"]) and network.is_finite):
            what = "holds weights that are" if math.isfinite(means["loss"]) else f"has the loss {means['loss']},"
            raise GeolocError(
                f"the head of epoch {epoch + 1} {what} no numbers: training has run away; pass an --lr below "
                f"{config.lr:g}, and another --out"
            )
        return {"lr": rate, **{f"train_{name}": value for name, value in means.items()}}

    def _summed(self, figures: dict[str, Tensor], *, is_asked: bool) -> dict[str, Tensor]:
        """Sum the gradients over the ranks, the figures with them, and how many ranks were asked to stop, told last."""
        told_K = self._network.told_K
        told_K.zero_()
        told_K[: len(figures)] = torch.stack(list(figures.values()))
        told_K[-1] = float(is_asked)
        self._group.add(self._network.gradient)
        return dict(zip(figures, told_K, strict=False))


def _take_down(
    state: State, network: Network, scores: Scores, config: FitConfig, figures: dict[str, float], start: float
) -> None:
    """Bring the state to the end of an epoch that began at `start`, of time.monotonic."""
    chosen = scores.better if config.select_position == "auto" else config.select_position
    state.head = network.state()
    state.optimizer = network.optimizer.state_dict()
    reached = rank(scores.of(chosen))
    if scores.of(chosen).median_km < state.least_km:
        state.least_km, state.better_epoch = scores.of(chosen).median_km, state.epoch
    if reached > state.best_rank:
        state.best, state.best_epoch, state.best_rank = state.head, state.epoch, reached
        state.position, state.better_epoch = chosen, state.epoch
    seconds = round(time.monotonic() - start, 3)
    state.history.append({"epoch": state.epoch, "seconds": seconds, **figures, **_val_figures(scores)})


def _val_figures(scores: Scores) -> dict[str, float]:
    figures: dict[str, float] = {"val_top_1": _number(scores.top1.top_1), "val_top_5": _number(scores.top1.top_5)}
    for position in POSITIONS:
        figures |= {f"val_{position}_{name}": value for name, value in distances_by_name(scores.of(position)).items()}
    return figures


def distances_by_name(metrics: Metrics) -> dict[str, float]:
    """The figures that depend on the position."""
    bands = {band.name: band.percent for band in metrics.bands}
    return {"median_km": metrics.median_km, "mean_km": metrics.mean_km, **bands, "balscore": metrics.balscore}


def _number(value: float | None) -> float:
    return math.nan if value is None else value
