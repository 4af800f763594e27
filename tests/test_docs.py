"""The papers hold what they say: commands, options, configurations, the cluster file."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

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


@pytest.fixture
def cluster():
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text(encoding="utf-8"))


def test_cluster_file_passes_rays_schema(cluster):
    validate_config(prepare_config(cluster))


def test_cluster_head_takes_no_work(cluster):
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert "--num-cpus=0" in " ".join(cluster["head_start_ray_commands"])


def test_cluster_workers_start_from_none_and_gpus_are_spot(cluster):
    nodes = cluster["available_node_types"]
    workers = {name: node for name, node in nodes.items() if name != cluster["head_node_type"]}
    assert set(workers) == {"gpu_embed", "cpu_index"}
    assert {node["min_workers"] for node in workers.values()} == {0}
    assert workers["gpu_embed"]["resources"]["GPU"] == 1
    assert workers["gpu_embed"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


def test_cluster_nodes_reach_s3_by_their_role(cluster):
    for node in cluster["available_node_types"].values():
        assert node["node_config"]["IamInstanceProfile"]["Name"]
    text = (ROOT / "ray_cluster.yaml").read_text(encoding="utf-8").lower()
    assert "aws_secret" not in text
    assert "aws_access_key" not in text
