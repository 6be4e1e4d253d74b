"""`python -m geoloc_batch` is the command `geoloc`."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command. Ctrl-C while its modules are still being imported ends it in order, too."""
    try:
        from geoloc_batch.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("geoloc: error: stopped before it began", file=sys.stderr)
        return 75


if __name__ == "__main__":
    raise SystemExit(main())
