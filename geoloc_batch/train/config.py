"""Settings of training. Free of torch, so that `geoloc --help` answers at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from geoloc_batch.errors import ConfigError
from geoloc_batch.geo.home import expand_home

LossKind = Literal["ce", "weighted-ce", "ce+haversine", "weighted-ce+haversine", "smooth"]
Fusion = Literal["feature", "logit"]
Position = Literal["top1", "mean"]

DEFAULT_LOSS: LossKind = "weighted-ce+haversine"
DEFAULT_LAM = 0.05
DEFAULT_FUSION: Fusion = "feature"
DEFAULT_SEED = 0
DEFAULT_SHARES = (0.8, 0.1, 0.1)

MAX_DROPOUT = 0.99
MIN_TAU_KM = 0.001


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """One loss, as `HeadLoss` takes it."""

    kind: LossKind = DEFAULT_LOSS
    lam: float = DEFAULT_LAM
    smoothing: float = 0.1
    tau_km: float = 75.0
    is_normalised: bool = True

    @property
    def has_lam(self) -> bool:
        """Whether lam has a part in it."""
        return "haversine" in self.kind

    @property
    def settings(self) -> dict[str, float | str | bool]:
        """What decides it, by name."""
        if self.kind == "smooth":
            return {"kind": self.kind, "tau_km": self.tau_km, "normalise_targets": self.is_normalised}
        lam = {"lam": self.lam} if self.has_lam else {}
        return {"kind": self.kind, **lam, "label_smoothing": self.smoothing}

    @property
    def name(self) -> str:
        """For folders and tables: weighted-ce-haversine-lam0.05. No two values of lam have one name."""
        short = f"{self.lam:g}"
        lam = short if float(short) == self.lam else repr(self.lam)
        return self.kind.replace("+", "-") + (f"-lam{lam}" if self.has_lam else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class LossFlags:
    """What all losses of a command share."""

    label_smoothing: float = 0.1
    """Share of each target that is spread over all cells; `smooth` has targets of its own."""
    tau_km: float = 75.0
    """Of the loss `smooth`: a cell d km farther from the place than the nearest one gets exp(-d / tau)."""
    normalise_targets: bool = True
    """Of the loss `smooth`: scale each place's targets to a sum of 1. Without it they stand as PIGEON published
    them."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"--label-smoothing must be at least 0 and below 1, got {self.label_smoothing:g}")
        if not (math.isfinite(self.tau_km) and self.tau_km >= MIN_TAU_KM):
            raise ConfigError(f"--tau-km must be at least {MIN_TAU_KM:g}, got {self.tau_km:g}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitConfig:
    """Which places train, which choose the epoch (val), and which are asked only once (test)."""

    split_file: str = ""
    """CSV or Parquet with the columns key and split (train, val or test), such as the splits.parquet of an earlier
    training; places that it does not name are left out. Checked for leaks like every split. --shares and --split-seed
    have no part in it."""
    shares: tuple[float, float, float] = DEFAULT_SHARES
    """Shares of train, val and test. Places that have a (lat, lon) in common, in any of their views, are never
    parted."""
    block_km: float | None = None
    """Keep whole H3 blocks of about this size together, so that no test place has a neighbour in train."""
    buffer_km: float | None = None
    """With --block-km: leave out training places nearer than this to one of val or test. The default is half of
    --block-km."""
    split_seed: int = 0
    """Seed of the split alone; --seed leaves it as it is."""

    def __post_init__(self) -> None:
        expand_home(self, {"split_file"})
        if len(self.shares) != 3 or not all(0 < share < 1 for share in self.shares) or abs(sum(self.shares) - 1) > 1e-6:
            given = " ".join(f"{share:g}" for share in self.shares)
            raise ConfigError(f"--shares takes three numbers above 0 with the sum 1, such as 0.8 0.1 0.1, got {given}")
        if self.block_km is not None:
            _check_above("--block-km", self.block_km)
        if self.buffer_km is not None:
            if self.block_km is None:
                raise ConfigError(f"--buffer-km {self.buffer_km:g} is for blocks: give --block-km too, or leave it out")
            if not (math.isfinite(self.buffer_km) and self.buffer_km >= 0):
                raise ConfigError(f"--buffer-km must be at least 0, got {self.buffer_km:g}")
        if self.split_seed < 0:
            raise ConfigError(f"--split-seed must be at least 0, got {self.split_seed}")
        if self.split_file:
            self._check_no_part()

    def _check_no_part(self) -> None:
        if tuple(self.shares) != DEFAULT_SHARES:
            flag = f"--shares {' '.join(f'{share:g}' for share in self.shares)}"
        elif self.split_seed:
            flag = f"--split-seed {self.split_seed}"
        else:
            return
        raise ConfigError(f"{flag} has no part in --split-file {self.split_file}; leave one of them out")


@dataclass(frozen=True, kw_only=True, slots=True)
class FitConfig:
    """How a head is fitted."""

    epochs: int = 80
    """Passes over the training places."""
    patience: int = 15
    """Stop after this many epochs in which neither the balscore nor the median error on val was better than before."""
    batch_size: int | Literal["auto"] = "auto"
    """Places per step, of all ranks together. auto: 1024, or as many fewer as it takes for 16 steps an epoch, but not
    below 32."""
    lr: float = 1e-3
    """Highest learning rate of AdamW; it rises to it in a straight line, then falls along a cosine."""
    weight_decay: float = 1e-4
    """AdamW's, on the linear layer's weight."""
    warmup_epochs: float = 1.0
    """Epochs until the learning rate is at its highest."""
    dropout: float = 0.3
    """Share of the normed features that is dropped in each step."""
    view_dropout: float = 0.0
    """Probability with which each view of a place is left out in a step; one always stays."""
    norm_start: Literal["standard", "plain"] = "standard"
    """Where LayerNorm's scale and shift begin: such that each normed feature has mean 0 and deviation 1 over the
    training places, or at 1 and 0. Both are learned."""
    warm_start: str = ""
    """Begin with the weights of this head (best.pt or .safetensors). It is a candidate itself, as epoch 0: a training
    that only makes it worse gives it back."""
    select_position: Literal["auto", "top1", "mean"] = "auto"
    """Whose balscore on val chooses the epoch: the best cell's centroid (top1), the posterior mean, or, auto, the
    better of the two in each epoch. head.json names the one that chose, and `geoloc predict` follows it."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the matrix products in training. auto is bf16 on CUDA and on CPUs with bf16 matrix tiles (AMX), else fp32.
    Weights, losses and evaluation are always fp32."""
    hold: Literal["auto", "memory", "disk"] = "auto"
    """Keep the features in the device's memory, or in a nameless scratch file in --out. auto: in memory where they
    take no more than 60 % of what is free; several ranks of one machine share that, since each holds all features."""

    def __post_init__(self) -> None:
        expand_home(self, {"warm_start"})
        for flag, count in (
            ("--epochs", self.epochs),
            ("--patience", self.patience),
            ("--batch-size", 1024 if self.batch_size == "auto" else self.batch_size),
        ):
            if count < 1:
                raise ConfigError(f"{flag} must be at least 1, got {count}")
        _check_above("--lr", self.lr)
        for flag, value in (("--weight-decay", self.weight_decay), ("--warmup-epochs", self.warmup_epochs)):
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{flag} must be at least 0, got {value:g}")
        for flag, share in (("--dropout", self.dropout), ("--view-dropout", self.view_dropout)):
            if not 0 <= share <= MAX_DROPOUT:
                raise ConfigError(f"{flag} must be from 0 to {MAX_DROPOUT:g}, got {share:g}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Train a head on stored embeddings: cells in, a best.pt out that `geoloc predict --head` takes.

    With --sweep, one head for every combination of --cells, --loss, --lam, --fusion and --seed. Ranks that srun,
    accelerate launch or torchrun started train each head together, one GPU each.
    """

    embeddings: Positional[Annotated[tuple[str, ...], arg(metavar="EMBEDDINGS")]] = ()
    """Folders that `geoloc embed` or --save-embeddings wrote, all by the same encoder."""
    cells: tuple[str, ...] = ()
    """The cells that the head chooses among: what `geoloc cells build` wrote, or a geocell_info.json."""
    out: str = ""
    """Folder of the head. Run the same command again to go on where a training was cut off."""
    truth: str = ""
    """CSV or Parquet with key, lat, lon: where the places are. The key is the photo's, with --group-by the location's.
    Without it the photos' own json says so."""
    lat: str = ""
    """Column of the latitudes, where it is not called lat, latitude or true_lat."""
    lon: str = ""
    """Column of the longitudes, where it is not called lon, lng, long, longitude or true_lon."""
    tap: Literal["pooled", "projected"] = "pooled"
    """Which features they are, where another tool wrote the embeddings and no run.json says so."""
    group_by: str = ""
    """Member of the photos' json that names their location: all its photos become views of one place."""
    fusion: tuple[Fusion, ...] = ()
    """How views become one: feature takes the mean of their features (the default), logit the mean of their logits."""
    loss: tuple[LossKind, ...] = ()
    """Cross-entropy (ce), weighted by inverse frequency of the cells (weighted-ce), either plus lam x the mean distance
    in km from the posterior mean to the truth (+haversine), or against targets that fall with the distance (smooth).
    The default is weighted-ce+haversine."""
    lam: tuple[float, ...] = ()
    """Weight of the distance in losses with +haversine, per km; the default is 0.05."""
    seed: tuple[int, ...] = ()
    """Of the order and of dropout; the default is 0."""
    sweep: bool = False
    """Let --cells, --loss, --lam, --fusion and --seed be repeated: every combination is trained in a folder of its own
    below --out, and sweep.csv compares them."""
    loss_flags: LossFlags = field(default_factory=LossFlags)
    split: SplitConfig = field(default_factory=SplitConfig)
    fit: FitConfig = field(default_factory=FitConfig)

    def __post_init__(self) -> None:
        expand_home(self, {"out", "truth"})
        if not self.embeddings:
            raise ConfigError("no embeddings were given: name the folders that `geoloc embed` wrote")
        if not self.cells:
            raise ConfigError("--cells must be given: name the cells that the head is to choose among")
        if not self.out:
            raise ConfigError("--out must be given: name the folder for the head")
        for lam in self.lam:
            if not (math.isfinite(lam) and lam >= 0):
                raise ConfigError(f"--lam must be at least 0, got {lam:g}")
        for seed in self.seed:
            if seed < 0:
                raise ConfigError(f"--seed must be at least 0, got {seed}")
        self._check_repeated()
        if self.lam and self.loss and not any("haversine" in kind for kind in self.loss):
            raise ConfigError(f"--lam {self.lam[0]:g} has no part in --loss {self.loss[0]}; leave it out")
        self._check_views()

    def _check_repeated(self) -> None:
        for flag in ("cells", "fusion", "loss", "lam", "seed"):
            given = getattr(self, flag)
            if len(given) > 1 and not self.sweep:
                raise ConfigError(
                    f"--{flag} was given {len(given)} times; add --sweep to train a head for each, or give it once"
                )
            if len(set(given)) < len(given):
                twice = next(value for value in given if given.count(value) > 1)
                raise ConfigError(f"--{flag} {twice} was given twice; give it once")

    def _check_views(self) -> None:
        if self.group_by:
            return
        if self.fusion:
            raise ConfigError(
                f"--fusion {self.fusion[0]} is for places of several views: name their location with --group-by"
            )
        if self.fit.view_dropout:
            raise ConfigError(
                f"--view-dropout {self.fit.view_dropout:g} is for places of several views: name their location with "
                "--group-by"
            )


def _check_above(flag: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{flag} must be above 0, got {value:g}")
