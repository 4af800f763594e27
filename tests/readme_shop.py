"""The folder that README's commands leave, with an encoder that need not be trained.

sample/          the sample catalog
demo.yaml        README's configuration, paths made absolute, with tonight's catalog
store-trained/   two releases: of the catalog, and of tonight's
embeddings/      the second one, exported, with what serving needs
"""

import contextlib
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from jobs.config_file import read_config
from jobs.export import export
from jobs.export_layout import ExportOptions
from jobs.progress import Progress
from jobs.refresh import refresh
from jobs.sample import write_sample

ROOT = Path(__file__).resolve().parent.parent
QUIET = Progress(quiet=True)
PRODUCTS = 24
_made = []


def readme_shop(factory):
    """Make the folder, once a session; nothing may be changed in it. Needs a Ray that runs."""
    if not _made:
        folder = factory.mktemp("readme")
        _fill(folder)
        _made.append(folder)
    return _made[0]


def link_shop(factory, folder):
    """Link what the folder has into another, where more may be written."""
    for path in readme_shop(factory).iterdir():
        (folder / path.name).symlink_to(path)


def _fill(folder):
    write_sample(folder / "sample", products=PRODUCTS, seed=0, street_per_product=1, image_px=96)
    refresh(_write_config(folder, "catalog"), QUIET)
    _write_tonight(folder / "sample")
    config = _write_config(folder, "tonight")
    refresh(config, QUIET)
    options = ExportOptions(to=str(folder / "embeddings"), columns=("title", "price"), index=True)
    export(config, options, QUIET)


def _write_tonight(sample):
    """Write the next night's catalog: other prices, one other title, one product less."""
    table = pq.read_table(sample / "catalog.parquet")
    rows = [row | {"price": row["price"] + 1} for row in table.to_pylist()[:-1]]
    rows[0]["title"] = "A rug of another colour"
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), sample / "tonight.parquet")


def _write_config(folder, catalog):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    values = yaml.safe_load(block)
    values.pop("train")
    values["encoder"] = {"architecture": "vitrine-tiny", "pretrained": "random"}
    values["store"] = str(folder / values["store"])
    values["catalog"]["path"] = str(folder / "sample" / f"{catalog}.parquet")
    values["evaluate"]["queries"] = str(folder / values["evaluate"]["queries"])
    (folder / "demo.yaml").write_text(yaml.safe_dump(values))
    return read_config(folder / "demo.yaml")


def read_blocks(page, language="python"):
    """Return a page's blocks of a language, each with the output shown below it, or None."""
    pattern = rf"^```{language}\n(.*?)^```$(?:\n\n```\n(.*?)^```$)?"
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        (code, shown or None) for code, shown in re.findall(pattern, text, re.MULTILINE | re.DOTALL)
    ]


def run_blocks(page, namespace, replaced=()):
    """Run a page's Python in one namespace, in the working directory.

    Yields:
        Of each block: its code, the output shown below it, and what it printed.
    """
    for code, shown in read_blocks(page):
        for old, new in replaced:
            code = code.replace(old, new)
        printed = _Lines()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, page, "exec"), namespace)
        yield code, shown, printed.text


class _Lines:
    """Standard output that is kept."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        return len(text)

    def flush(self):
        pass
