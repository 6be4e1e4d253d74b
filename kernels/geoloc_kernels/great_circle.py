"""Distances along a spherical Earth, paired and between all pairs, with gradients.

    from geoloc_kernels import great_circle_km, pairwise_km
    great_circle_km(predicted_deg_B2, true_deg_B2)       # [B] kilometres
    pairwise_km(photo_deg_N2, centroid_deg_M2)           # [N, M] kilometres

Two custom ops with `haversine.distance_km` as their definition. On CUDA one Triton kernel each, in the inputs' dtype;
on the CPU all pairs go by chords in float64 (`chords`). Errors against 60 digits: float32 at most 3.5 m anywhere and
2 mm within 1 km; float64 under 0.01 mm.

Shape letters: N and M points, ... any leading shape. Points are (lat, lon) in degrees, in that order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geoloc_kernels.chords import pairwise_by_chords
from geoloc_kernels.haversine import distance_km, gradient_km

# Elements of a block on the CPU, and of one of the backward pass: each is read and written some forty times.
_BLOCK_CPU = 1 << 15
_BLOCK_CUDA = 1 << 22


def great_circle_km(a_deg: Tensor, b_deg: Tensor) -> Tensor:
    """Distance of each point of one tensor to its mate in the other.

    The gradient is finite everywhere: zero between identical points and at exact antipodes, where there is none.

    Args:
        a_deg: [..., 2] float32 or float64, (lat, lon) in degrees: latitudes within +-90, longitudes of any size.
        b_deg: the same dtype and device, a shape that broadcasts with it.

    Returns:
        [...] kilometres, of the inputs' dtype; NaN where a coordinate is NaN or infinite.

    Raises:
        ValueError: a shape does not end in 2, the shapes do not broadcast, or dtypes or devices differ.
    """
    check_points("a_deg", a_deg, "b_deg", b_deg)
    try:
        shape = torch.broadcast_shapes(a_deg.shape, b_deg.shape)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise ValueError(f"the shapes {tuple(a_deg.shape)} and {tuple(b_deg.shape)} do not pair") from error
    km: Tensor = paired_op(a_deg.expand(shape), b_deg.expand(shape))
    return km


def pairwise_km(a_deg_N2: Tensor, b_deg_M2: Tensor) -> Tensor:
    """Distance of every point to every other one.

    Args:
        a_deg_N2: [N, 2] float32 or float64, (lat, lon) in degrees: latitudes within +-90, longitudes of any size.
        b_deg_M2: [M, 2], the same dtype and device.

    Returns:
        [N, M] kilometres, of the inputs' dtype; NaN where a coordinate is NaN or infinite.

    Raises:
        ValueError: a shape is not [N, 2], or dtypes or devices differ.
    """
    check_points("a_deg_N2", a_deg_N2, "b_deg_M2", b_deg_M2, dims=2)
    km_NM: Tensor = pairwise_op(a_deg_N2, b_deg_M2)
    return km_NM


def check_points(name: str, a_deg: Tensor, other: str, b_deg: Tensor, *, dims: int | None = None) -> None:
    """Whether two tensors hold points that may meet.

    Args:
        name: of the first, for the message.
        a_deg: [..., 2].
        other: name of the second.
        b_deg: [..., 2].
        dims: how many dimensions both must have; None for any.

    Raises:
        ValueError: they do not.
    """
    for which, point_deg in ((name, a_deg), (other, b_deg)):
        if point_deg.ndim < 1 or point_deg.shape[-1] != 2 or (dims is not None and point_deg.ndim != dims):
            wanted = "[N, 2]" if dims == 2 else "[..., 2]"
            raise ValueError(f"{which} must be {wanted} (lat, lon) in degrees, got the shape {tuple(point_deg.shape)}")
        if point_deg.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{which} must be float32 or float64, got {point_deg.dtype}; pass {which}.float()")
    if a_deg.dtype != b_deg.dtype:
        raise ValueError(f"{name} is {a_deg.dtype}, {other} is {b_deg.dtype}; pass both in one precision")
    if a_deg.device != b_deg.device:
        raise ValueError(f"{name} is on {a_deg.device}, {other} on {b_deg.device}; move one to the other")


@torch.library.custom_op("geoloc::great_circle_km", mutates_args=())
def paired_op(a_deg: Tensor, b_deg: Tensor) -> Tensor:
    """`great_circle_km` of two tensors of one shape."""
    return distance_km(a_deg, b_deg).contiguous()


@torch.library.custom_op("geoloc::pairwise_km", mutates_args=())
def pairwise_op(a_deg_N2: Tensor, b_deg_M2: Tensor) -> Tensor:
    """`pairwise_km`."""
    return distance_km(a_deg_N2[:, None], b_deg_M2[None])


@torch.library.custom_op("geoloc::pairwise_km_backward", mutates_args=())
def pairwise_backward_op(grad_NM: Tensor, a_deg_N2: Tensor, b_deg_M2: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients [N, 2] and [M, 2] of `pairwise_km`, block by block: no more than the [N, M] that came in is held."""
    grad_a_N2, grad_b_M2 = a_deg_N2.new_zeros(a_deg_N2.shape), b_deg_M2.new_zeros(b_deg_M2.shape)
    block = _BLOCK_CUDA if grad_NM.is_cuda else _BLOCK_CPU
    rows = max(1, block // max(1, len(b_deg_M2)))
    for start in range(0, len(a_deg_N2), rows):
        part = slice(start, start + rows)
        a, b, grad = a_deg_N2[part, None], b_deg_M2[None], grad_NM[part, :, None]
        grad_a_N2[part] = (gradient_km(a, b) * grad).sum(dim=1)
        grad_b_M2 += (gradient_km(b, a) * grad).sum(dim=0)
    return grad_a_N2, grad_b_M2


@paired_op.register_kernel("cpu")
def _paired_cpu(a_deg: Tensor, b_deg: Tensor) -> Tensor:
    if a_deg.numel() <= 2 * _BLOCK_CPU:
        return distance_km(a_deg, b_deg).contiguous()
    # By blocks, whose temporaries stay in the cache.
    km = a_deg.new_empty(a_deg.shape[:-1])
    a_deg, b_deg = a_deg.reshape(-1, 2), b_deg.reshape(-1, 2)
    for start in range(0, km.numel(), _BLOCK_CPU):
        part = slice(start, start + _BLOCK_CPU)
        km.view(-1)[part] = distance_km(a_deg[part], b_deg[part])
    return km


@pairwise_op.register_kernel("cpu")
def _pairwise_cpu(a_deg_N2: Tensor, b_deg_M2: Tensor) -> Tensor:
    return pairwise_by_chords(a_deg_N2, b_deg_M2)


@paired_op.register_kernel("cuda")
def _paired_cuda(a_deg: Tensor, b_deg: Tensor) -> Tensor:
    from geoloc_kernels.triton_great_circle import launch_paired

    return launch_paired(a_deg, b_deg)


@pairwise_op.register_kernel("cuda")
def _pairwise_cuda(a_deg_N2: Tensor, b_deg_M2: Tensor) -> Tensor:
    from geoloc_kernels.triton_great_circle import launch_pairwise

    return launch_pairwise(a_deg_N2, b_deg_M2)


@paired_op.register_fake
def _paired_fake(a_deg: Tensor, b_deg: Tensor) -> Tensor:
    return a_deg.new_empty(a_deg.shape[:-1])


@pairwise_op.register_fake
def _pairwise_fake(a_deg_N2: Tensor, b_deg_M2: Tensor) -> Tensor:
    return a_deg_N2.new_empty(a_deg_N2.shape[0], b_deg_M2.shape[0])


@pairwise_backward_op.register_fake
def _pairwise_backward_fake(grad_NM: Tensor, a_deg_N2: Tensor, b_deg_M2: Tensor) -> tuple[Tensor, Tensor]:
    return a_deg_N2.new_empty(a_deg_N2.shape), b_deg_M2.new_empty(b_deg_M2.shape)


def _keep_points(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _paired_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    a_deg, b_deg = ctx.saved_tensors
    grad = grad.unsqueeze(-1)
    return gradient_km(a_deg, b_deg) * grad, gradient_km(b_deg, a_deg) * grad


def _pairwise_backward(ctx: Any, grad_NM: Tensor) -> tuple[Tensor, Tensor]:
    grad_a_N2, grad_b_M2 = pairwise_backward_op(grad_NM, *ctx.saved_tensors)
    return grad_a_N2, grad_b_M2


paired_op.register_autograd(_paired_backward, setup_context=_keep_points)
pairwise_op.register_autograd(_pairwise_backward, setup_context=_keep_points)
