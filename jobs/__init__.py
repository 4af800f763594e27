"""The jobs: reading catalogs, running the stages on Ray, writing, measuring, publishing."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    __version__ = version("vitrine")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"


def check_installation() -> None:
    """Check that `encoders` and `indexing` are the ones that belong to this `jobs` package.

    The three names are generic: a stranger's package of the same name, installed later into the
    same environment, would replace ours without a word.

    Raises:
        ImportError: One of the two packages lies somewhere else than beside `jobs`.
    """
    import encoders
    import indexing

    home = Path(__file__).resolve().parent.parent
    for package in (encoders, indexing):
        found = Path(str(package.__file__)).resolve().parent.parent
        if found != home:
            raise ImportError(
                f"package {package.__name__!r} is {found}, expected it beside jobs in {home}; "
                "install Vitrine into an environment of its own"
            )
