"""Geolocate millions of photos offline: tar shards in, one row per photo out.

The command line's verbs as functions::

    from geoloc_batch import embed, predict, load_encoder, load_head

    embed("shards/*.tar", out="emb", encoder="path/to/checkpoint")
    predict("shards/*.tar", out="pred", encoder="path/to/checkpoint", head="best.pt", cells="geocell_info.json")
"""

import os

# Read by OpenMP when torch is loaded. By default its idle threads spin, on CPUs that the decode threads need: with two
# of them and one decode thread each, a CPU run is up to ten times slower so.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from geoloc_batch.api import (
    embed,
    evaluate_predictions,
    fidelity,
    load_encoder,
    load_head,
    measure_stream,
    merge,
    pack,
    predict,
    read_tables,
    retry,
    status,
    train_head,
    verify,
)

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "embed",
    "evaluate_predictions",
    "fidelity",
    "load_encoder",
    "load_head",
    "measure_stream",
    "merge",
    "pack",
    "predict",
    "read_tables",
    "retry",
    "status",
    "train_head",
    "verify",
]
