"""``python -m corefit``: the same as the console script."""

from corefit.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
