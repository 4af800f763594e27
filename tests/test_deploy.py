"""What runs Vitrine elsewhere: cluster files, image, units, and the page that explains them."""

import ast
import configparser
import fnmatch
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config

from jobs.cli import app
from jobs.cluster import HEAD_ENVIRONMENT
from jobs.config_file import read_config

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
OPERATIONS = ROOT / "docs" / "operations.md"
FILES = [ROOT / "ray_cluster.yaml", OPERATIONS, *(p for p in DEPLOY.rglob("*") if p.is_file())]
COMMANDS = typer.main.get_command(app).commands
IDLE = "RAY_idle_worker_killing_time_threshold_ms"
GIB = 2**30


def read(path):
    return path.read_text(encoding="utf-8")


def read_yaml(path):
    return list(yaml.safe_load_all(read(path)))


@pytest.fixture
def cluster():
    return read_yaml(ROOT / "ray_cluster.yaml")[0]


@pytest.fixture
def rayjob():
    return read_yaml(DEPLOY / "kuberay" / "rayjob.yaml")[0]


def pods(rayjob):
    """Every pod's spec by its group: the head, gpu-embed, cpu-index."""
    spec = rayjob["spec"]["rayClusterSpec"]
    workers = {one["groupName"]: one["template"]["spec"] for one in spec["workerGroupSpecs"]}
    return {"head": spec["headGroupSpec"]["template"]["spec"], **workers}


def ray_container(pod):
    return next(one for one in pod["containers"] if one["name"] == "ray")


# Ray's cluster launcher


def test_cluster_file_passes_rays_schema(cluster):
    validate_config(prepare_config(cluster))


def test_cluster_head_takes_no_work(cluster):
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert "--num-cpus=0 --num-gpus=0" in " ".join(cluster["head_start_ray_commands"])


def test_cluster_gpus_are_spot_and_start_from_none(cluster):
    nodes = cluster["available_node_types"]
    assert set(nodes) == {"head", "gpu_embed", "cpu_index"}
    assert nodes["gpu_embed"]["min_workers"] == 0
    assert nodes["gpu_embed"]["resources"]["GPU"] == 1
    spot = {name for name, node in nodes.items() if "InstanceMarketOptions" in node["node_config"]}
    assert spot == {"gpu_embed"}
    assert nodes["cpu_index"]["min_workers"] >= 1
    assert nodes["cpu_index"]["resources"]["memory"] >= 64 * GIB


def test_cluster_run_asks_for_the_gpus_that_may_start(cluster):
    nodes = cluster["available_node_types"]
    text = read(ROOT / "ray_cluster.yaml")
    assert "--set embed.gpus_per_actor=1 " in text
    actors = int(re.findall(r"--set embed.actors=(\d+)", text)[0])
    assert actors == nodes["gpu_embed"]["max_workers"]


def test_cluster_nodes_reach_s3_by_their_role(cluster):
    for node in cluster["available_node_types"].values():
        assert node["node_config"]["IamInstanceProfile"]["Name"]


def test_no_file_has_a_secret():
    for path in FILES:
        text = read(path).lower()
        assert "aws_secret" not in text, path
        assert "aws_access_key" not in text, path


def test_raylets_keep_idle_workers_as_local_ones_do(cluster, rayjob):
    wanted = HEAD_ENVIRONMENT[IDLE]
    for kind in ("head", "worker"):
        start = [one for one in cluster[f"{kind}_start_ray_commands"] if "ray start" in one]
        assert len(start) == 1
        assert f"{IDLE}={wanted} " in start[0]
    for pod in pods(rayjob).values():
        assert {"name": IDLE, "value": wanted} in ray_container(pod)["env"]


def test_cluster_ships_logs_from_where_ray_writes_them(cluster):
    agent = next(one for one in cluster["initialization_commands"] if "docker run" in one)
    assert "--volume /tmp/ray:/tmp/ray:ro" in agent
    assert "-v /tmp/ray:/tmp/ray" in cluster["docker"]["run_options"]
    assert f"region={cluster['provider']['region']}" in shlex.split(agent)


# Kubernetes


def test_kubernetes_files_are_complete():
    folder = DEPLOY / "kuberay"
    found = {path.name for path in folder.iterdir()}
    kustomization = read_yaml(folder / "kustomization.yaml")[0]
    made = kustomization["configMapGenerator"][0]
    assert {*kustomization["resources"], *made["files"], "kustomization.yaml"} == found
    kinds = [one["kind"] for name in kustomization["resources"] for one in read_yaml(folder / name)]
    assert sorted(kinds) == ["CronJob", "Role", "RoleBinding", "ServiceAccount", "ServiceAccount"]


def test_rayjob_is_one_that_ends(rayjob):
    assert (rayjob["apiVersion"], rayjob["kind"]) == ("ray.io/v1", "RayJob")
    spec = rayjob["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] == 1
    follower = read_yaml(DEPLOY / "kuberay" / "schedule.yaml")[0]["spec"]
    assert follower["concurrencyPolicy"] == "Forbid"
    tries = 1 + spec["backoffLimit"]
    assert follower["jobTemplate"]["spec"]["activeDeadlineSeconds"] > (
        tries * spec["activeDeadlineSeconds"]
    )


def test_rayjob_groups_are_those_of_the_cluster_file(rayjob, cluster):
    spec = rayjob["spec"]["rayClusterSpec"]
    groups = {one["groupName"].replace("-", "_"): one for one in spec["workerGroupSpecs"]}
    nodes = cluster["available_node_types"]
    assert set(groups) == set(nodes) - {"head"}
    for name, group in groups.items():
        assert group["minReplicas"] == nodes[name]["min_workers"]
        assert group["maxReplicas"] == nodes[name]["max_workers"]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}


def test_rayjob_offers_what_the_configuration_asks_for(rayjob):
    config = read_config(DEPLOY / "kuberay" / "job.yaml")
    by_group = pods(rayjob)
    limits = {name: ray_container(pod)["resources"]["limits"] for name, pod in by_group.items()}
    assert {name for name, one in limits.items() if "nvidia.com/gpu" in one} == {"gpu-embed"}
    groups = rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    gpus = next(one for one in groups if one["groupName"] == "gpu-embed")
    assert config.embed.actors == gpus["maxReplicas"] * limits["gpu-embed"]["nvidia.com/gpu"]
    assert config.ray.address == "auto"
    assert config.store.startswith("s3://")
    assert config.catalog.path.startswith("s3://")
    assert config.embed.gpus_per_actor == limits["gpu-embed"]["nvidia.com/gpu"]


def test_every_pod_sees_the_configuration_and_ships_its_logs(rayjob):
    made = read_yaml(DEPLOY / "kuberay" / "kustomization.yaml")[0]["configMapGenerator"][0]
    accounts = {
        one["metadata"]["name"]
        for one in read_yaml(DEPLOY / "kuberay" / "accounts.yaml")
        if one["kind"] == "ServiceAccount"
    }
    job = read_yaml(DEPLOY / "kuberay" / "schedule.yaml")[0]["spec"]["jobTemplate"]["spec"]
    for pod in (*pods(rayjob).values(), job["template"]["spec"]):
        assert pod["serviceAccountName"] in accounts
        volumes = {one["name"]: one for one in pod["volumes"]}
        assert volumes["config"]["configMap"]["name"] == made["name"]
        for container in pod["containers"]:
            assert {one["name"] for one in container["volumeMounts"]} <= set(volumes)
            for file in re.findall(r"/etc/vitrine/([\w.-]+)", str(container)):
                assert file in made["files"]
    for pod in pods(rayjob).values():
        assert [one["name"] for one in pod["containers"]] == ["ray", "fluent-bit"]


# The image


def test_image_is_the_same_everywhere(cluster, rayjob):
    wanted = cluster["docker"]["image"]
    found = {ray_container(pod)["image"] for pod in pods(rayjob).values()}
    for path in FILES:
        found |= set(re.findall(r"example/vitrine:[\w.]+", read(path)))
    assert found == {wanted}
    version = re.search(r'^version = "(.+)"', read(ROOT / "pyproject.toml"), re.MULTILINE)[1]
    assert wanted.rpartition(":")[2] == version


def test_ray_is_the_locked_one(rayjob):
    locked = dict(line.split("==") for line in read(ROOT / "requirements.lock").split())
    assert rayjob["spec"]["rayClusterSpec"]["rayVersion"] == locked["ray"]


def test_the_lock_has_what_a_cluster_needs():
    locked = [Requirement(line) for line in read(ROOT / "requirements.lock").splitlines()]
    assert all(len(one.specifier) == 1 and "==" in str(one.specifier) for one in locked)
    names = {re.sub(r"[-_.]+", "-", one.name).lower() for one in locked}
    # Of Ray's dashboard, its job submission and its metrics; and of its AWS launcher.
    assert {"aiohttp-cors", "opencensus", "prometheus-client", "virtualenv"} <= names
    assert "boto3" in names


def test_image_has_what_its_dockerfile_copies():
    ignored = read(DEPLOY / "Dockerfile.dockerignore").split()
    kept = [one.removeprefix("!") for one in ignored if one.startswith("!")]
    assert ignored[0] == "*"
    copied = re.findall(r"^COPY (.+) \S+$", read(DEPLOY / "Dockerfile"), re.MULTILINE)
    sources = [source for line in copied for source in line.split()]
    assert {"requirements.lock", "jobs", "encoders", "indexing"} <= set(sources)
    assert [one for one in sources if not (ROOT / one).exists()] == []
    assert [one for one in sources if not any(fnmatch.fnmatch(one, k) for k in kept)] == []


def test_image_runs_as_the_user_that_the_pods_name(rayjob):
    text = read(DEPLOY / "Dockerfile")
    user = re.search(r"useradd .*--uid (\d+) (\w+)", text)
    assert f"\nUSER {user[2]}\n" in text
    assert f"ENV HOME=/home/{user[2]} " in text  # Ray's launcher reads it from the image
    for pod in pods(rayjob).values():
        assert pod["securityContext"]["runAsUser"] == int(user[1])


# The commands, the units, the page


def strings(value):
    """Every text of parsed YAML: folded lines are one there."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from strings(one)


def shown_commands():
    """Every `vitrine` command line of these files, up to what ends it."""
    names, found = "|".join(COMMANDS), []
    for path in FILES:
        folded = list(strings(read_yaml(path))) if path.suffix == ".yaml" else []
        comments = re.findall(r"#.*", read(path)) if folded else [read(path)]
        for text in (*folded, *comments):
            for line in re.findall(rf"\bvitrine ((?:{names})\b[^\n`;|>]*)", text):
                found.append(pytest.param(line, id=f"{path.name}: {line[:50]}"))
    return found


@pytest.mark.parametrize("line", shown_commands())
def test_command_is_one_that_the_command_line_takes(line):
    words = shlex.split(line.rstrip("'") if line.count("'") % 2 else line)
    name, arguments = words[0], words[1:]
    if not {"-c", "--config"} & set(arguments):  # named in a sentence
        arguments = ["--config", "job.yaml", *arguments]
    context = COMMANDS[name].make_context(name, arguments)
    read_config(DEPLOY / "kuberay" / "job.yaml", context.params.get("overrides") or ())


@pytest.mark.parametrize("name", sorted(path.name for path in (DEPLOY / "systemd").iterdir()))
def test_systemd_takes_the_unit(name, tmp_path):
    for path in (DEPLOY / "systemd").iterdir():
        text = read(path).replace("/opt/vitrine/bin/vitrine", sys.executable)
        (tmp_path / path.name).write_text(text, encoding="utf-8")
    parsed = configparser.ConfigParser(strict=True, interpolation=None)
    parsed.optionxform = str
    parsed.read_string(read(DEPLOY / "systemd" / name))
    assert parsed.sections()[0] == "Unit"
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        return
    done = subprocess.run(
        [analyze, "verify", "--man=no", str(tmp_path / name)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_cron_lines_have_a_time_and_a_user():
    lines = [one for one in read(DEPLOY / "cron" / "vitrine").splitlines() if one[0] != "#"]
    assert [re.search(r"bin/vitrine (\w+)", line)[1] for line in lines] == ["refresh", "gc"]
    for line in lines:
        assert re.match(r"\d+ \d+ \* \* [*\d] vitrine \S", line)
        assert "%" not in line  # a new line, to cron
        assert re.search(r" > \w+\.log$", line)  # what it prints would be mailed each time


def said_by_the_code():
    """Every text of the sources; what a format fills in is an ellipsis."""
    texts = []
    for path in (ROOT / "jobs").glob("*.py"):
        for node in ast.walk(ast.parse(read(path))):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(re.sub(r"%(s|[\d.]*f|g)", "…", node.value))
    return texts


def test_page_quotes_only_messages_that_there_are():
    section = read(OPERATIONS).partition("## When it fails")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| .+ \| .+ \|$", section, re.MULTILINE)
    quoted = [one for row in rows for one in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) > 20
    texts = said_by_the_code()
    unsaid = []
    for message in quoted:
        parts = [one.strip(" ;:") for one in re.split(r"…|\(|\)", message)]
        parts = [one for one in parts if len(one) > 2]
        if not all(any(part in text for text in texts) for part in parts):
            unsaid.append(message)
    assert unsaid == []


def test_page_names_only_existing_files():
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", read(OPERATIONS))
    assert targets
    assert [one for one in targets if not (OPERATIONS.parent / one).exists()] == []
