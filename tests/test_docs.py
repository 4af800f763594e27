"""The papers hold what they say: commands, options, configurations, links."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from pages import read_blocks, read_page, shown_commands

from jobs.cli import app
from jobs.config import JobConfig

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = typer.main.get_command(app).commands
PAGES = [
    str(path.relative_to(ROOT))
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    )
]
README = read_page("README.md")
MINIMAL = {
    "store": "store",
    "catalog": {"path": "catalog.parquet"},
    "encoder": {"architecture": "vitrine-tiny", "pretrained": "random"},
}


def our_commands(page):
    """Every `vitrine` command line of a page: after a prompt, and whole in backticks."""
    prompts = [re.findall(r"(?<!\S)vitrine (.+)", line) for line in shown_commands(page)]
    return sum(prompts, re.findall(r"`vitrine ([a-z][^`\n]+)`", read_page(page)))


def without_code(page):
    return re.sub(r"^```.*?^```$", "", read_page(page), flags=re.MULTILINE | re.DOTALL)


def anchors(page):
    """What GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", without_code(page), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", title.lower().strip()) for title in titles)
    return {title.replace(" ", "-") for title in plain}


def test_reference_is_current():
    done = subprocess.run(
        [sys.executable, "docs/make_reference.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_readme_shows_every_command():
    assert {line.split()[0] for line in our_commands("README.md")} == set(COMMANDS)


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_options_exist(page):
    for line in our_commands(page):
        name, *words = shlex.split(line.partition(" | ")[0], comments=True)
        assert name in COMMANDS, line
        params = COMMANDS[name].params
        options = {option for one in params for option in (*one.opts, *one.secondary_opts)}
        unknown = {word for word in words if re.match(r"--?[a-z]", word)} - options - {"--help"}
        assert not unknown, line


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", without_code(page)):
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(str(path.resolve().relative_to(ROOT))), f"{page}: {target}"


def test_every_page_is_on_the_map():
    linked = set(re.findall(r"\]\(([\w/.-]+\.md)\)", read_page("docs/index.md")))
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    assert pages - {"index.md"} <= linked


@pytest.mark.parametrize("page", PAGES)
def test_configurations_are_valid(page):
    for language, body, _ in read_blocks(page):
        found = yaml.safe_load(body) if language == "yaml" else None
        if isinstance(found, dict) and set(found) & set(JobConfig.model_fields):
            JobConfig.model_validate(MINIMAL | found)


@pytest.mark.parametrize("page", PAGES)
def test_python_compiles(page):
    for language, body, _ in read_blocks(page):
        if language == "python":
            compile(body, page, "exec")


@pytest.mark.parametrize("page", PAGES)
def test_targets_of_make_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", read_page("Makefile"), re.MULTILINE))
    shown = [line.split()[1] for line in shown_commands(page) if line.startswith("make ")]
    shown += re.findall(r"`make ([a-z-]+)`", read_page(page))
    assert set(shown) <= targets


def test_readme_has_configurations_and_python():
    assert {"yaml", "python", "console"} <= {
        language for language, _, _ in read_blocks("README.md")
    }
    assert "docs/index.md" in README
