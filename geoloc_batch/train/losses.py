"""The losses that heads are trained with, and their gradients at the logits, written by hand.

With p = soft-max(z) over C cells, y the true cell, w the cells' weights, e the label smoothing, x_c the unit vectors of
the centroids, t that of the truth, d_c the km from the truth to centroid c, and W = sum of w_y over the batch:

    ce, weighted-ce     torch.nn.functional.cross_entropy(z, y, weight=w, label_smoothing=e)
                        = (1 - e) sum_b w_y (-log p_y) / W  +  e / C sum_b sum_c w_c (-log p_c) / W
    ... + haversine     + lambda * mean_b R angle(v, t),    v = sum_c p_c x_c
    smooth              mean_b sum_c T_c (-log p_c),        T_c = exp(-(d_c - min d) / tau), divided by its sum or not

The gradients need the probabilities and a product with a matrix of four columns, so that one call costs a handful of
passes over the logits, far less than the products on either side of it. No autograd graph is built.

Shape letters: B rows, C cells.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from geoloc_batch.geo.sphere import EARTH_RADIUS_KM

Kind = Literal["ce", "weighted-ce", "ce+haversine", "weighted-ce+haversine", "smooth"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# A mean vector shorter than this is the rounding of vectors that cancel: it points nowhere.
_MIN_RESULTANT = 1e-6
# Sine of an angle below which the way from the mean to the truth is rounding: 6 micrometres on the ground.
_MIN_SINE = 1e-12
# Targets below e^-80 are set to that: nothing beside a target of 1, but no denormal, at which `exp` is 50 times slower.
_MIN_EXPONENT = -80.0


class HeadLoss:
    """One of the losses for one partition.

    Args:
        kind: one of KINDS.
        xyz_C3: [C, 3] the unit vectors of the centroids, in the order of the logits.
        cell_weight_C: [C] weights of the cells, not negative; the kinds with `weighted` need them, the others take
            none. Their scale is of no account.
        lam: how much a kilometre of the mean haversine distance costs, beside the cross-entropy in nats.
        label_smoothing: the share of each target that is spread evenly over all cells; `smooth` has none of it.
        tau_km: over which distance the targets of `smooth` fall to 1 / e.
        is_normalised: whether the targets of `smooth` add up to 1. As published they don't: a place with many cells
            near it then weighs more.

    Raises:
        ValueError: the kind is unknown, the weights are missing, not wanted or of another length, or a number is out
            of range.

    Source: label smoothing, Szegedy et al., "Rethinking the Inception Architecture" (CVPR 2016), weighted as PyTorch
    does; `smooth`, Haas et al., "PIGEON: Predicting Image Geolocations" (CVPR 2024), equation 2. There the distance
    to the true cell's centroid is taken off, here that to the nearest centroid, which is the same for most places and,
    where the targets are normalised, for all.
    """

    def __init__(
        self,
        kind: Kind,
        xyz_C3: ArrayLike | Tensor,
        cell_weight_C: ArrayLike | Tensor | None = None,
        *,
        lam: float = 0.05,
        label_smoothing: float = 0.1,
        tau_km: float = 75.0,
        is_normalised: bool = True,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"a loss is one of {', '.join(KINDS)}, not {kind!r}")
        if (cell_weight_C is not None) != kind.startswith("weighted"):
            raise ValueError(f"{kind} {'takes no' if cell_weight_C is not None else 'needs'} weights of the cells")
        if not (0 <= lam < math.inf and 0 <= label_smoothing <= 1 and 0 < tau_km < math.inf):
            raise ValueError(
                f"lambda is from 0, label smoothing from 0 to 1, tau above 0 km; got {lam}, {label_smoothing}, {tau_km}"
            )
        self.kind, self.lam, self.tau_km, self.is_normalised = kind, lam, tau_km, is_normalised
        self.label_smoothing = label_smoothing
        self.has_haversine = kind.endswith("haversine")
        self._xyz_C3 = torch.as_tensor(xyz_C3, dtype=torch.float64)
        assert self._xyz_C3.shape[1:] == (3,), f"unit vectors are [C, 3], got {tuple(self._xyz_C3.shape)}"
        num_cells = len(self._xyz_C3)
        weight_C = np.ones(num_cells) if cell_weight_C is None else cell_weight_C
        self._weight_C = torch.as_tensor(weight_C, dtype=torch.float64)
        if self._weight_C.shape != (num_cells,) or not bool((self._weight_C >= 0).all()):
            raise ValueError(f"the weights of {num_cells} cells are so many numbers, none negative")
        self._xyz1_C4, self._w_C = torch.empty(0), torch.empty(0)

    @torch.no_grad()
    def value_and_grad(
        self, logit_BC: Tensor, cell_B: Tensor, xyz_B3: Tensor, all_cell: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The loss of a batch and its gradient at the logits; or of a part of one, to be summed over the parts.

        Args:
            logit_BC: [B, C] float32 or float64. Its memory is overwritten and becomes the gradient's.
            cell_B: [B] int64, the true cells' rows.
            xyz_B3: [B, 3] the unit vectors of the truth, any float dtype.
            all_cell: the true cells of the whole batch, where these are a part of it.

        Returns:
            The loss (0-dim); its parts before lambda by name: `ce` (nats) or `smooth`, and with haversine
            `haversine_km`, the mean distance from the posterior's mean; [B, C] the gradient. Nothing waits for the
            device.
        """
        xyz1_C4, w_C = self._constants(logit_BC)
        all_cell = cell_B if all_cell is None else all_cell
        logit_BC -= logit_BC.amax(dim=1, keepdim=True)
        if self.kind == "smooth":
            return self._smooth(logit_BC, xyz_B3.to(logit_BC.dtype), xyz1_C4, len(all_cell))
        label_B1 = cell_B[:, None]
        at_label_B = logit_BC.gather(1, label_B1)[:, 0]
        # The weights of the labels, divided by their sum; zeros where no label has any.
        w_B = w_C[cell_B]
        total = w_C[all_cell].sum()
        w_B = w_B * torch.where(total > 0, 1 / total, 0.0)
        spread = self.label_smoothing / len(w_C) * torch.where(total > 0, 1 / total, 0.0)
        at_all_B = logit_BC @ w_C if self.label_smoothing else torch.zeros_like(w_B)
        e_BC = logit_BC.exp_()
        # One product gives the mean vectors and, by the column of ones, what divides them.
        sum_B4 = e_BC @ xyz1_C4
        norm_B = sum_B4[:, 3]
        log_norm_B = norm_B.log()
        own_B = (1 - self.label_smoothing) * w_B
        w_sum = w_C.sum()
        ce = (own_B * (log_norm_B - at_label_B)).sum() + spread * (w_sum * log_norm_B - at_all_B).sum()
        loss, parts = ce, {"ce": ce}
        # The gradient is p_c (scale + slope . x_c) less the targets: a vector of four for each row, times [x_c, 1]. The
        # soft-max's other term, slope . v, is zero: the angle does not depend on v's length.
        scale_B = own_B + spread * w_sum
        if self.has_haversine:
            angle_B, slope_B3 = _angle_and_slope(sum_B4[:, :3] / norm_B[:, None], xyz_B3)
            km = EARTH_RADIUS_KM * (angle_B.sum() / len(all_cell)).to(ce.dtype)
            loss, parts = ce + self.lam * km, {"ce": ce, "haversine_km": km}
            factor = self.lam * EARTH_RADIUS_KM / len(all_cell)
            slope_B4 = torch.cat([(factor * slope_B3).to(ce.dtype), scale_B[:, None]], dim=1)
            factor_BC = (slope_B4 / norm_B[:, None]) @ xyz1_C4.T
            grad_BC = torch.addcmul(-spread * w_C, e_BC, factor_BC, out=e_BC)
        else:
            grad_BC = e_BC.mul_((scale_B / norm_B)[:, None])
            if self.label_smoothing:
                grad_BC -= spread * w_C
        grad_BC.scatter_add_(1, label_B1, -own_B[:, None])
        return loss, parts, grad_BC

    def _smooth(
        self, logit_BC: Tensor, xyz_B3: Tensor, xyz1_C4: Tensor, num_all: int
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        target_BC = smooth_targets(xyz_B3, xyz1_C4[:, :3], self.tau_km, is_normalised=self.is_normalised)
        total_B = target_BC.sum(dim=1)
        at_targets_B = torch.linalg.vecdot(target_BC, logit_BC)
        e_BC = logit_BC.exp_()
        norm_B = e_BC.sum(dim=1)
        loss = (total_B * norm_B.log() - at_targets_B).sum() / num_all
        grad_BC = e_BC.mul_((total_B / norm_B / num_all)[:, None]).sub_(target_BC, alpha=1 / num_all)
        return loss, {"smooth": loss}, grad_BC

    def _constants(self, logit_BC: Tensor) -> tuple[Tensor, Tensor]:
        """[x_c, 1] and the weights as the logits are, kept from call to call."""
        assert logit_BC.dtype in (torch.float32, torch.float64), (
            f"a loss takes float32 or float64, got {logit_BC.dtype}"
        )
        assert logit_BC.shape[1] == len(self._weight_C), f"{logit_BC.shape[1]} logits, {len(self._weight_C)} cells"
        if (self._w_C.dtype, self._w_C.device) != (logit_BC.dtype, logit_BC.device) or not len(self._w_C):
            one_C1 = torch.ones(len(self._xyz_C3), 1, dtype=torch.float64, device=self._xyz_C3.device)
            xyz1_C4 = torch.cat([self._xyz_C3, one_C1], dim=1).to(logit_BC)
            # Its transpose is contiguous: the product with [B, C] is 20 times faster so than the other way round.
            self._xyz1_C4 = xyz1_C4.T.contiguous().T
            self._w_C = self._weight_C.to(logit_BC)
        return self._xyz1_C4, self._w_C


def smooth_targets(xyz_B3: Tensor, xyz_C3: Tensor, tau_km: float, *, is_normalised: bool = True) -> Tensor:
    """[B, C] the targets of `smooth`: exp(-(d - min d) / tau), d the great-circle km from a place to each centroid.

    Args:
        xyz_B3: [B, 3] unit vectors of the places.
        xyz_C3: [C, 3] those of the centroids, of the same dtype.
        tau_km: the distance over which a target falls to 1 / e.
        is_normalised: divide each row by its sum.
    """
    # The chord from differences of coordinates: from 1 minus a dot product it is a kilometre off in float32. Its arc
    # loses digits near antipodes alone, whose targets are zero.
    chord_BC = torch.cdist(xyz_B3, xyz_C3, compute_mode="donot_use_mm_for_euclid_dist")
    arc_BC = chord_BC.mul_(0.5).clamp_(max=1.0).asin_()
    arc_BC -= arc_BC.amin(dim=1, keepdim=True)
    target_BC = arc_BC.mul_(-2 * EARTH_RADIUS_KM / tau_km).clamp_(min=_MIN_EXPONENT).exp_()
    if is_normalised:
        target_BC /= target_BC.sum(dim=1, keepdim=True)
    return target_BC


def inverse_frequency(cell_N: ArrayLike | Tensor, num_cells: int) -> Tensor:
    """[C] float32 weights of the cells: N / (cells with a place x the cell's places), 0 for a cell without any.

    The mean weight of the N places is 1.

    Args:
        cell_N: [N] the cell's row of each training place.
        num_cells: C.
    """
    count_C = torch.bincount(torch.as_tensor(cell_N, dtype=torch.int64), minlength=num_cells).double()
    assert len(count_C) == num_cells, f"a cell of {len(count_C) - 1} among {num_cells}"
    filled = (count_C > 0).sum()
    return torch.where(count_C > 0, count_C.sum() / (filled * count_C), 0.0).float()


def _angle_and_slope(mean_B3: Tensor, xyz_B3: Tensor) -> tuple[Tensor, Tensor]:
    """[B] the angle between v and t, and [B, 3] its gradient at v, which is perpendicular to v.

    In float64, because a few numbers a row cost nothing. Where v and t coincide or are opposite, the gradient is zero,
    as it is where v vanishes: the angle there is a right one, its mean over all directions.
    """
    v_B3, t_B3 = mean_B3.double(), xyz_B3.double()
    length_B1 = torch.linalg.vector_norm(v_B3, dim=1, keepdim=True)
    u_B3 = v_B3 / length_B1.clamp(min=_MIN_RESULTANT)
    cos_B1 = torch.linalg.vecdot(u_B3, t_B3)[:, None]
    # As long as the cross product, and as exact where both are nearly parallel.
    aside_B3 = t_B3 - cos_B1 * u_B3
    sine_B1 = torch.linalg.vector_norm(aside_B3, dim=1, keepdim=True)
    has_slope_B1 = (length_B1 > _MIN_RESULTANT) & (sine_B1 > _MIN_SINE)
    slope_B3 = torch.where(has_slope_B1, -aside_B3 / sine_B1 / length_B1, 0.0)
    return torch.atan2(sine_B1, cos_B1)[:, 0], slope_B3
