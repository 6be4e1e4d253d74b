"""A batch cut into chunks, each computed by one thread alone: how bf16 and fp16 run on a CPU.

oneDNN cuts the sums of a matrix product by the number of threads that share it, so that in bf16 the features of a
whole batch move by 0.3 % between one thread and two. One thread to a product leaves nothing to cut: which photos stand
together depends on the batch size and the model alone, never on the machine. It is no slower than sharing products
out, since nobody waits for anybody between two layers.

Shape letters: B batch, S image side, D features
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

# Rows of a matrix product: enough to keep the tiles busy, few enough that 32 photos of ViT-B/32 make 4 chunks.
_TOKENS_PER_CHUNK = 400
# What ViT-B/32 has; for towers without tokens.
_USUAL_TOKENS = 50


def chunk_size(batch_size: int, num_tokens: int | None) -> int:
    """Photos to a chunk: about 400 tokens, the batch shared out evenly."""
    most = max(1, _TOKENS_PER_CHUNK // (num_tokens or _USUAL_TOKENS))
    num_chunks = -(-batch_size // most)
    return -(-batch_size // num_chunks)


class Chunks:
    """Calls a tower with chunks of one fixed size.

    Args:
        run: [size, S, S, 3] uint8 to [size, D]; called by several threads at once.
        size: photos to a chunk; the last one is filled up with black ones.
        num_threads: chunks at once.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], *, size: int, num_threads: int) -> None:
        self._run, self._size = run, size
        self._is_warm = False
        before = torch.get_num_threads()
        started = threading.Barrier(num_threads)
        self._pool = ThreadPoolExecutor(num_threads, "encode", initializer=_take_one_thread)
        list(self._pool.map(lambda _: started.wait(), range(num_threads)))
        # The workers keep their one thread; what the process had holds for everybody else.
        torch.set_num_threads(before)

    def __call__(self, pixels_BSS3: Tensor) -> Tensor:
        """[B, S, S, 3] uint8 to [B, D]."""
        chunks = self._cut(pixels_BSS3)
        done = []
        if not self._is_warm:
            # A compiled tower is compiled by its first call: by one thread, not by all.
            done.append(self._pool.submit(self._step, chunks.pop(0)).result())
            self._is_warm = True
        done.extend(self._pool.map(self._step, chunks))
        return torch.cat(done)[: len(pixels_BSS3)]

    def _cut(self, pixels_BSS3: Tensor) -> list[Tensor]:
        # Plain tensors all of them: one made in inference mode is of another kind, and a compiled graph would be made
        # again for it.
        with torch.inference_mode(False):
            chunks = list(torch.split(pixels_BSS3, self._size))
            missing = self._size - len(chunks[-1])
            if missing:
                chunks[-1] = nn.functional.pad(chunks[-1], (0, 0) * 3 + (0, missing))
            return chunks

    def _step(self, pixels_BSS3: Tensor) -> Tensor:
        assert torch.get_num_threads() == 1
        with torch.inference_mode():
            return self._run(pixels_BSS3)


def _take_one_thread() -> None:
    # Asked once, torch gives this thread the process's number; unasked it would do so at the first product.
    torch.get_num_threads()
    torch.set_num_threads(1)
