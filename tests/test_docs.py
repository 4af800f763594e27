"""The papers hold what they say: commands, options, configurations."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from jobs.cli import app
from jobs.config import JobConfig

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = typer.main.get_command(app).commands


def fenced(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def shown_commands():
    """Every `vitrine` command line of the README: after a prompt, and whole in backticks."""
    prompts = re.findall(r"^\$ vitrine (.+)$", README, re.MULTILINE)
    inline = re.findall(r"`vitrine ([^`\n]+)`", README)
    return prompts + inline


def test_config_page_is_current():
    done = subprocess.run(
        [sys.executable, "docs/make_config.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_readme_shows_every_command():
    assert {line.split()[0] for line in shown_commands()} == set(COMMANDS)


@pytest.mark.parametrize("line", shown_commands())
def test_readme_command_exists(line):
    name, *words = shlex.split(line, comments=True)
    assert name in COMMANDS
    params = COMMANDS[name].params
    options = {option for one in params for option in (*one.opts, *one.secondary_opts)}
    assert {word for word in words if re.match(r"--?[a-z]", word)} <= options


def test_readme_names_only_existing_files():
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    assert targets
    assert [name for name in targets if not (ROOT / name).exists()] == []


def test_readme_configs_are_valid():
    blocks = fenced("yaml")
    assert blocks
    for block in blocks:
        JobConfig.model_validate(yaml.safe_load(block))


def test_readme_python_compiles():
    blocks = fenced("python")
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")
