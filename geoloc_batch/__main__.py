"""`python -m geoloc_batch` is the command `geoloc`."""

from geoloc_batch.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
