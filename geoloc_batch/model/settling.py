"""What an encoder's settings leave open is found by trying it out on the encoder's own device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from geoloc_batch.model.batch_size import largest_that_fits
from geoloc_batch.model.choice import choose_sdpa, read_choice
from geoloc_batch.model.config import EncoderConfig
from geoloc_batch.model.tower import attention_shape

if TYPE_CHECKING:
    from geoloc_batch.model.encoder import Encoder


def settle_by_trying(encoder: Encoder, config: EncoderConfig) -> None:
    """Attention's backend, then the batch size that fits beside it; then what `geoloc warmup` has chosen for both.

    Raises:
        OutOfMemoryError, RuntimeError: torch's, where not even the smallest batch fits.
    """
    device = encoder.device
    if config.sdpa == "auto":
        shape = attention_shape(encoder.tower)
        encoder.settle(sdpa=choose_sdpa(shape, batch_size=config.given_batch_size, device=device))
    if config.given_batch_size is None:
        encoder.settle(batch_size=largest_that_fits(encoder.try_out, device=device))
    kept = read_choice(encoder.cache_root(), encoder.graph_facts(), asked=config.sdpa)
    if kept is not None and config.sdpa == "auto":
        encoder.settle(sdpa=kept.sdpa)
    if kept is not None and config.compile_mode == "auto":
        encoder.settle(compile_mode=kept.compile_mode)
