"""Every error that the package raises on purpose.

GeolocError                    the root; the command line prints it without a traceback
|-- UserError (ValueError)     misuse, exit code 2: the message names the thing, its value and the remedy
|   |-- ConfigError            a flag, or a key of a TOML file
|   |-- InputError             shards, photos or embeddings that cannot be found or told apart
|   |-- CheckpointError        an encoder's checkpoint
|   |-- HeadError              a head's file, or a head that does not fit the encoder, the tap or the cells
|   |-- PartitionError         a partition of geocells
|   |-- SplitError             a split into train, val and test that leaks, or leaves one of them empty
|   `-- OutputError            an output folder that cannot be used, or that was pinned to another config
|-- HubError                   a download that was needed and could not be had, exit code 1
|-- DecodeError                one photo, becomes an error row
`-- DamageError                the bytes of a shard, becomes a unit error
"""

from __future__ import annotations

EXIT_COMPLETE, EXIT_FAILED, EXIT_MISUSE, EXIT_WITH_ERRORS, EXIT_INCOMPLETE = 0, 1, 2, 3, 75
"""What a command ends with. 3: complete, with unit errors or too many error rows. 75: run the same command again."""


class GeolocError(Exception):
    """Root of the tree."""


class UserError(GeolocError, ValueError):
    """The user can mend it: exit code 2."""


class ConfigError(UserError):
    """A flag or a key of a TOML file has a value that cannot be."""


class InputError(UserError):
    """Shards, photos or embeddings are missing or of no known kind."""


class CheckpointError(UserError):
    """An encoder's checkpoint is missing, incomplete or of an unknown form."""


class HeadError(UserError):
    """A head's file is wrong, or the head does not fit what it is used with."""


class PartitionError(UserError):
    """A partition's file is wrong, or the partition does not fit the head."""


class SplitError(UserError):
    """A split into train, val and test leaks, leaves one of them empty, or cannot be made."""


class OutputError(UserError):
    """The output folder cannot be used, or belongs to a run with another config."""


class HubError(GeolocError):
    """A file had to be downloaded and could not be."""


class DecodeError(GeolocError):
    """One photo cannot be decoded. ``retryable`` tells whether another try could help."""

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


class DamageError(GeolocError):
    """A shard cannot be read on from ``offset``.

    Args:
        message: what is wrong.
        offset: position of the damage in the shard, bytes (of the uncompressed stream for gzip).
        bytes_unread: bytes of the shard after it, None where the length is unknown.
        retryable: True for a fault of the transport, False for damage in the file itself.
    """

    def __init__(self, message: str, *, offset: int, bytes_unread: int | None, retryable: bool = False) -> None:
        super().__init__(message)
        self.offset = offset
        self.bytes_unread = bytes_unread
        self.retryable = retryable


class StopRequested(BaseException):
    """A signal asked for a stop while there was nothing to finish. Like KeyboardInterrupt, no Exception."""
