"""The command line as people and scripts meet it: all commands are held to the same."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from datetime import date
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from readme_shop import PRODUCTS, readme_shop
from store_maker import Row, append, publish

from jobs import __version__
from jobs.cli import app
from jobs.cli_options import plain, print_json
from jobs.store import Store

COMMANDS = typer.main.get_command(app).commands
SCRIPT = Path(sys.executable).parent / "vitrine"
HEAVY = ("torch", "ray", "pyarrow", "faiss", "deltalake", "open_clip", "PIL", "fastapi")
SERVES = {"demo"}  # reports nothing


def options_of(name):
    return {opt: one for one in COMMANDS[name].params for opt in one.opts}


@pytest.mark.parametrize("name", COMMANDS)
def test_example_is_shown_and_can_be_parsed(name):
    command = COMMANDS[name]
    assert command.epilog.startswith(f"Example: vitrine {name} ")
    _, found, *words = shlex.split(command.epilog.removeprefix("Example: "))
    assert found == name
    assert words
    command.make_context(name, words)  # a usage error if an option isn't there, or its value bad


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_is(name):
    assert [one.name for one in COMMANDS[name].params if not one.help] == []


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - SERVES))
def test_what_reports_has_json(name):
    assert options_of(name)["--json"].is_flag


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"status"}))  # which takes no time
def test_what_takes_time_can_be_quiet(name):
    assert options_of(name)["--quiet"] is options_of(name)["-q"]


def run(*words, env=None, **options):
    return subprocess.run(
        [str(SCRIPT), *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | (env or {}),
        check=False,
        **options,
    )


def test_version():
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"vitrine {__version__}\n", "")


def test_no_word_shows_help():
    done = run()
    assert done.returncode == 2
    assert all(name in done.stdout + done.stderr for name in COMMANDS)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["refesh"], "Did you mean 'refresh'"),
        (["status", "--confg", "x"], "--config"),
        (["status"], "--config"),
        (["search", "--config", "x"], "give --image, --text, or both"),
        (["search", "--config", "x", "-t", "a", "--k", "0"], "--k"),
        (["export", "--config", "x", "--to", "y", "--dtype", "int8"], "float16"),
    ],
)
def test_wrong_usage_is_told_and_ends_with_2(call_vitrine, words, told):
    done = call_vitrine(*words)
    assert done.returncode == 2
    assert told in re.sub(r"[│\s]+", " ", done.stderr)
    assert "Traceback" not in done.stderr


def test_help_and_completion_load_nothing_heavy():
    code = (
        "import os, sys\nfrom jobs.cli import app, main\n"
        "def run(*words):\n"
        "    sys.argv = ['vitrine', *words]\n"
        "    try: main()\n"
        "    except SystemExit as stop: assert stop.code == 0, stop.code\n"
        "run('--help')\n"
        f"for name in {sorted(COMMANDS)}: run(name, '--help')\n"
        "os.environ['_VITRINE_COMPLETE'] = 'complete_bash'\n"
        "for line in ('vitrine re', 'vitrine refresh --', 'vitrine export --field '):\n"
        "    os.environ |= {'COMP_WORDS': line, 'COMP_CWORD': str(line.count(' '))}\n"
        "    run()\n"
        f"found = [name for name in {HEAVY} if name in sys.modules]\n"
        "sys.exit(str(found) if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS.values():
        assert shlex.split(command.epilog)[-1] in done.stdout
    assert "--dry-run" in done.stdout.split()


def complete(line):
    words = line.split(" ")
    variables = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = run(env=variables | {"_VITRINE_COMPLETE": "complete_bash"})
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("vitrine re", {"refresh", "reindex", "rejects"}),
        ("vitrine search --im", {"--image", "--image-weight"}),
        ("vitrine refresh --set embed.batch", {"embed.batch_size="}),
        ("vitrine search --field m", {"multimodal"}),
        ("vitrine export --field ", {"image", "text", "multimodal"}),
        ("vitrine rejects --reason time", {"timeout"}),
        ("vitrine rejects --kind t", {"transient"}),
    ],
)
def test_shell_completes(line, expected):
    assert set(complete(line)) == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script_is_for_vitrine(shell):
    done = run(
        "--show-completion", shell, env={"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "_VITRINE_COMPLETE" in done.stdout


def test_completion_can_be_installed(tmp_path):
    shell = {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = run("--install-completion", "bash", env=shell)
    assert done.returncode == 0, done.stderr
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert any("_VITRINE_COMPLETE" in text for text in written)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.dates()
    | st.decimals(allow_nan=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES)
def test_json_holds_any_value(value):
    text = json.dumps(plain({"value": value}), allow_nan=False)
    assert json.loads(text) == plain({"value": value})


def test_json_keeps_numbers_numbers(capsys):
    print_json(
        {
            "nan": float("nan"),
            "decimal": Decimal("12.5"),
            "numpy": [np.float32(0.5), np.int64(7)],
            "day": date(2026, 1, 31),
            "path": Path("a/b"),
            "true": True,
        }
    )
    assert json.loads(capsys.readouterr().out) == {
        "nan": None,
        "decimal": 12.5,
        "numpy": [0.5, 7],
        "day": "2026-01-31",
        "path": "a/b",
        "true": True,
    }


@pytest.fixture
def small(tmp_path):
    """The configuration of a store with a release, in which nothing is real but its tables."""
    store = Store(str(tmp_path / "store"))
    append(store, [Row(product=1, generation=1)])
    publish(store, "r1")
    config = tmp_path / "config.yaml"
    config.write_text(
        f"store: {store.root}\ncatalog: {{path: {tmp_path}/catalog.parquet}}\n"
        "encoder: {architecture: vitrine-tiny, pretrained: random}\n"
    )
    return config


@pytest.mark.parametrize("words", [["status"], ["status", "--json"]])
def test_reader_that_leaves_gets_no_traceback(small, words):
    child = subprocess.Popen(
        [str(SCRIPT), *words, "--config", str(small)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    child.stdout.close()  # before a word is written
    err = child.stderr.read()
    child.stderr.close()
    assert child.wait(60) == 1
    assert err == ""


def test_head_of_a_table(small):
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {SCRIPT} status --config {small} | head -1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stderr, done.stdout.count("\n")) == ("", 1)


def test_table_in_a_pipe_is_wide_and_plain(small):
    done = run("status", "--config", small, env={"COLUMNS": "40"})
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "2026-01-31T12:00:00+00:00" in done.stdout


def test_interrupt_is_one_line_and_130(tmp_path):
    child = subprocess.Popen(
        [str(SCRIPT), "sample", str(tmp_path / "sample"), "--products", "60"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background, a shell has it ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not any(path.suffix == ".jpg" for path in tmp_path.rglob("*")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert out == ""
    assert err.splitlines()[-1].startswith("vitrine: interrupted; what was committed stays")
    assert "Traceback" not in err


CONFIG = "store: {folder}/store\ncatalog:\n  path: {folder}/catalog.parquet\n{more}"
ENCODER = "encoder: {architecture: vitrine-tiny, pretrained: random}\n"


@pytest.mark.parametrize(
    ("more", "override", "told"),
    [
        (ENCODER + "embed: {batchsize: 3}\n", "", ["line 5", "'embed.batchsize'", "batch_size'?"]),
        (ENCODER + "embed:\n  batch_size: many\n", "", ["line 6: embed.batch_size", "'many'"]),
        (ENCODER + "gate: {max_reject_share: 2}\n", "", ["line 5: gate.max_reject_share", "2"]),
        (ENCODER + "embed: [\n", "", ["is no YAML: line 6"]),
        (ENCODER, "embed.batch_size=many", ["config.yaml: embed.batch_size", "'many'"]),
        (ENCODER, "embed.batch_size", ["--set 'embed.batch_size': expected section.key=value"]),
        (ENCODER, "a=[", ["--set 'a=['"]),
        ("", "", ["encoder is missing"]),
    ],
)
def test_config_fault_names_key_and_line(call_vitrine, failed_line, tmp_path, more, override, told):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(folder=tmp_path, more=more))
    done = call_vitrine("status", "--config", path, *(["--set", override] if override else []))
    line = failed_line(done)
    assert override.startswith(("embed.batch_size", "a")) or str(path) in line
    assert [part for part in told if part not in line] == []


@pytest.fixture
def catalog(tmp_path):
    """Write a catalog; return the arguments that name its configuration."""

    def write(table):
        pq.write_table(table, tmp_path / "catalog.parquet")
        (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path, more=ENCODER))
        return ["--config", tmp_path / "config.yaml"]

    return write


def test_missing_column_is_told_with_those_that_are_there(call_vitrine, failed_line, catalog):
    words = catalog(pa.table({"product_id": ["a"], "name": ["A"], "image_uri": ["a.jpg"]}))
    line = failed_line(call_vitrine("refresh", *words))
    assert all(part in line for part in ("catalog.parquet", "'title' is missing", "name"))


def test_damaged_catalog_names_its_file(call_vitrine, failed_line, catalog, tmp_path):
    words = catalog(pa.table({"product_id": ["a"]}))
    path = tmp_path / "catalog.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    assert str(path) in failed_line(call_vitrine("refresh", *words))


def test_catalog_that_is_not_there(call_vitrine, failed_line, catalog, tmp_path):
    words = catalog(pa.table({"product_id": ["a"]}))
    (tmp_path / "catalog.parquet").unlink()
    assert "catalog.parquet does not exist" in failed_line(call_vitrine("refresh", *words))


@pytest.fixture(scope="module")
def shop(local_ray, tmp_path_factory):
    return readme_shop(tmp_path_factory)


def test_null_product_names_file_and_row(local_ray, call_vitrine, catalog):
    images, titles = ["a.jpg"] * 3, ["A"] * 3
    products = pa.array(["a", None, "c"], pa.string())
    table = pa.table({"product_id": products, "title": titles, "image_uri": images})
    done = call_vitrine("refresh", *catalog(table), "--quiet")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert all(part in line for part in ("catalog.parquet", "row 1", "null product id"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["search", "-t", "rug", "--release", "9"], "no release 9, but 2, 1"),
        (["search", "-t", "rug", "--field", "sound"], "no field 'sound'; it has multimodal, image"),
        (["search", "-t", " "], "text is empty"),
        (["search", "-i", "nowhere.jpg"], "nowhere.jpg can't be used: not_found"),
        (["search", "-i", "demo.yaml"], "demo.yaml can't be used: not_an_image"),
        (["rejects", "--reason", "timeuot"], "did you mean 'timeout'?"),
        (["rollback", "9"], "no release 9, but 2, 1"),
        (["export", "--to", "new", "--column", "prize"], "no column 'prize'; it has title"),
        (["export", "--to", "new", "--field", "sound"], "no field 'sound'; it has image"),
        (["export", "--to", "embeddings"], "is not empty"),
        (["evaluate", "--release", "9"], "no release 9, but 2, 1"),
    ],
)
def test_unknown_name_is_told_with_what_there_is(call_vitrine, shop, monkeypatch, words, told):
    monkeypatch.chdir(shop)
    done = call_vitrine(*words, "--config", "demo.yaml")
    assert done.returncode == 1, done
    line = done.stderr.splitlines()[-1]
    assert line.startswith("vitrine: error: ")
    assert told in line
    assert done.stdout == ""


def no_nan(text):
    raise ValueError(f"{text} in JSON")


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["status"], "releases"),
        (["search", "-t", "rug"], "results"),
        (["rejects", "-q"], "rejects"),
        (["refresh", "--dry-run", "-q"], "counts"),
        (["refresh", "-q"], "published"),
        (["plan", "-q"], "plan"),
        (["evaluate", "-q"], "metrics"),
        (["export", "--to", "{folder}/out", "-q"], "files"),
        (["gc", "--dry-run", "-q"], "kept"),
        (["reindex", "--no-publish", "-q"], "candidate"),
        (["rollback", "1", "-q"], "replaced"),
        (["sample", "{folder}/sample", "--products", "3", "-q"], "products"),
        (["import-csv", "{folder}/products.csv", "{folder}/shop", "-q"], "products"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_json_is_one_object_and_quiet_is_quiet(
    call_vitrine, shop, tmp_path, monkeypatch, words, key
):
    (tmp_path / "products.csv").write_text("id,title,image\n1,Rug,a.jpg\n2,Vase,b.jpg\n")
    words = [word.format(folder=tmp_path) for word in words]
    if "--config" in options_of(words[0]):
        shutil.copytree(shop / "store-trained", tmp_path / "store")
        words += ["--config", shop / "demo.yaml", "--set", f"store={tmp_path / 'store'}"]
    monkeypatch.chdir(tmp_path)
    done = call_vitrine(*words, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    found = json.loads(done.stdout, parse_constant=no_nan)
    assert key in found
    assert done.stderr == ""


def test_progress_of_a_refresh_is_plain_in_a_pipe(call_vitrine, shop, tmp_path):
    words = ["--config", shop / "demo.yaml", "--set", f"store={tmp_path / 'store'}"]
    catalog = shop / "sample" / "catalog.parquet"
    done = call_vitrine("refresh", *words, "--set", f"catalog.path={catalog}")
    assert done.returncode == 0, done.stderr
    assert "vitrine: compare the catalog with the store\n" in done.stderr
    assert f"  {PRODUCTS} of {PRODUCTS} rows" in done.stderr
    assert done.stderr.replace("\n", "").isprintable()
    assert done.stdout.startswith("release 1 published")
