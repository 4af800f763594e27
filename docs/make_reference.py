"""Writes the generated pages of the reference: docs/config.md, docs/cli.md, docs/tables.md.

Run `python docs/make_reference.py` to write them, with `--check` to exit 1 if one is out of date.
"""

import argparse
import sys
from pathlib import Path

from make_cli import render_cli
from make_config import render_config
from make_tables import render_tables

DOCS = Path(__file__).resolve().parent
PAGES = {"config.md": render_config, "cli.md": render_cli, "tables.md": render_tables}


def main() -> None:
    """Write the pages, or with --check say which are out of date; exit 1 if one is."""
    parser = argparse.ArgumentParser(description="Write the generated pages of the reference.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if outdated")
    check, outdated = parser.parse_args().check, []
    for name, render in PAGES.items():
        page, wanted = DOCS / name, render()
        if not check:
            page.write_text(wanted, encoding="utf-8")
        elif not page.exists() or page.read_text(encoding="utf-8") != wanted:
            outdated.append(f"docs/{name}")
    if outdated:
        sys.exit(f"{', '.join(outdated)} out of date: run `make docs`")


if __name__ == "__main__":
    main()
