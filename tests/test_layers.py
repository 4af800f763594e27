"""The layer rule: two cores that never meet, one shell around them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    f"jobs.{name}"
    for name in (
        "refresh",
        "reindex",
        "rejects",
        "export",
        "rollback",
        "gc",
        "evaluate",
        "sample",
        "train",
        "import_csv",
        "demo",
        "cli",
    )
}
SHELL = {"ray", "pyarrow", "pydantic", "deltalake", "jobs"}


def read_imports(path):
    """Every module that a file imports, lazily too; `from a import b` gives a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    return files


def offenders(files, forbidden):
    """(file, import) of all imports that are or lie below a forbidden module."""
    return [
        (str(path.relative_to(ROOT)), name)
        for path in files
        for name in sorted(read_imports(path))
        if any(name == one or name.startswith(f"{one}.") for one in forbidden)
    ]


def test_encoders_know_neither_indexing_nor_the_shell():
    assert offenders(modules("encoders"), SHELL | {"indexing", "faiss"}) == []


def test_indexing_knows_neither_encoders_nor_the_shell():
    forbidden = SHELL | {"encoders", "torch", "torchvision", "open_clip"}
    assert offenders(modules("indexing"), forbidden) == []


def test_commands_import_no_other_command():
    entries = ("cli.py", "cli_demo.py", "cli_store.py", "__main__.py")
    files = [path for path in modules("jobs") if path.name not in entries]
    assert offenders(files, COMMANDS) == []


def test_open_clip_stays_in_encoders():
    assert offenders([*modules("jobs"), *modules("indexing")], {"open_clip"}) == []


def test_faiss_stays_in_indexing_and_its_stage():
    allowed = {"jobs/index_files.py", "jobs/index_tasks.py", "jobs/probe.py"}
    found = offenders([*modules("jobs"), *modules("encoders")], {"faiss"})
    assert {path for path, _ in found} <= allowed


def test_stages_know_one_core_each():
    jobs = ROOT / "jobs"
    assert offenders([jobs / "embed.py"], {"indexing", "faiss", "jobs.index"}) == []
    assert offenders([jobs / "index.py"], {"encoders", "torch", "jobs.embed"}) == []


@pytest.mark.parametrize(
    ("module", "absent"),
    [("jobs.index", "torch"), ("jobs.embed", "faiss"), ("jobs.refresh", "torch")],
)
def test_stage_never_loads_the_other_core(module, absent):
    code = f"import sys, {module}; sys.exit({absent!r} in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr or f"{module} loads {absent}"


def test_no_test_lies_in_a_folder_named_like_a_package():
    assert not [
        name for name in ("encoders", "indexing", "jobs") if (ROOT / "tests" / name).exists()
    ]
