"""Runs the command line: `python -m jobs` is `vitrine`."""

from jobs.cli import main

if __name__ == "__main__":
    main()
