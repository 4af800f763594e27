"""Runs the commands that a Markdown page shows, in order, and compares what they print.

In a ```console block a line that begins with `$ ` is a command; a line that ends with a backslash
goes on in the next. What follows is its output: each line must be found in what is printed, in this
order. Whole numbers must be equal; decimals, times, run names and fingerprints may differ, table
borders don't count, `…` stands for anything, and /home/you/shop is the folder that the page is run
in, and may be left out. A run name that was shown stands for the real one in the commands after it.

HTML comments right above a block tell what a reader need not see:

<!-- file: NAME -->                    the block's text is written to this file
<!-- not run: REASON -->               nothing of this block is run
<!-- run: exit 1 -->                   its last command ends with this status
<!-- run: with --set train.steps=2 --> every vitrine command of it gets these words too; whole
                                      numbers may differ then
<!-- run: output of another run -->    its output is not compared
<!-- before: SCRIPT -->                for bash, or one vitrine command: run first
"""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHOWN_FOLDER = "/home/you/shop"
# What is not run though no comment says so: it serves for ever, installs, or tests.
NEVER_RUN = ("make ", "pip ", "docker ", "vitrine demo ")
BLOCK = re.compile(
    r"(?P<comments>(?:<!--(?:(?!-->).)*-->\s*)*)^```(?P<language>\w+)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
COMMENT = re.compile(r"<!--\s*(file|not run|run|before):\s*(.*?)\s*-->", re.DOTALL)
RUN_NAME = r"\d{8}T\d{6}-[0-9a-f]{6}"
MASKED = re.compile(
    rf"(?P<run>{RUN_NAME})|(?P<hex>[0-9a-f]{{12,64}})|(?P<number>-?\d[\d,]*[.:][\d.:]*)"
    r"|(?P<date>\d{4}-\d\d-\d\d)|(?P<whole>\d[\d,]*)|(?P<any>…)|(?P<gap>\s+)"
)
PATTERNS = {
    "run": RUN_NAME,
    "hex": "[0-9a-f]{12,64}",
    "number": r"-?[\d.,:]+",
    "date": r"\d{4}-\d\d-\d\d",
    "whole": r"[\d,]+",
    "any": ".*",
    "gap": r"\s*",
}
BORDERS = re.compile("[\u2500-\u257f]")
SHELL = re.compile(r"[|<>;&$`*]")


@dataclass(frozen=True, kw_only=True)
class Step:
    """A command and the lines that it shows below itself."""

    command: str
    shown: tuple[str, ...] = ()
    status: int = 0
    words: tuple[str, ...] = ()
    """What a vitrine command gets beside what is shown; whole numbers may differ then."""


@dataclass(kw_only=True)
class Page:
    """A page on its way: its folder, what it printed, which real run each shown one stands for."""

    name: str
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    in_process: bool = True
    runs: dict[str, str] = field(default_factory=dict)
    not_run: list[str] = field(default_factory=list)


def read_page(name):
    return (ROOT / name).read_text(encoding="utf-8")


def read_blocks(name):
    """Every fenced block: its language, its text, its comments as (kind, words)."""
    return [
        (one["language"], one["body"], COMMENT.findall(one["comments"]))
        for one in BLOCK.finditer(read_page(name))
    ]


def read_steps(body):
    """The commands of a console block, each with its shown lines."""
    steps, lines = [], body.splitlines()
    while lines:
        line = lines.pop(0)
        if not line.startswith("$ "):
            steps[-1][1].append(line)  # an IndexError here: output without a command
            continue
        while line.endswith("\\"):
            line = line[:-1] + lines.pop(0)
        steps.append((line[2:], []))
    return steps


def shown_commands(name):
    """Every command of a page's console blocks, run or not."""
    blocks = [body for language, body, _ in read_blocks(name) if language == "console"]
    return [command for body in blocks for command, _ in read_steps(body)]


def run_page(page):
    """Run a page's blocks; AssertionError names the command that failed, or the missing line."""
    for language, body, comments in read_blocks(page.name):
        told = dict(comments)
        if "file" in told:
            path = page.folder / told["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(body, encoding="utf-8")
        if "before" in told:
            run_step(page, Step(command=told["before"]))
        if language == "console":
            run_block(page, body, told)


def run_block(page, body, told):
    run = told.get("run", "")
    extra = tuple(shlex.split(run.removeprefix("with "))) if run.startswith("with ") else ()
    steps = read_steps(body)
    for number, (command, shown) in enumerate(steps, 1):
        if "not run" in told or f"{command} ".startswith(NEVER_RUN):
            page.not_run.append(command)
            continue
        last = number == len(steps)
        status = int(run.split()[1]) if run.startswith("exit ") and last else 0
        shown = () if run == "output of another run" else tuple(filter(str.strip, shown))
        run_step(page, Step(command=command, shown=shown, status=status, words=extra))


def run_step(page, step):
    command = step.command
    for shown, real in page.runs.items():
        command = command.replace(shown, real)
    command = command.replace(SHOWN_FOLDER, str(page.folder))
    is_ours = command.startswith("vitrine ")
    if is_ours and step.words:
        command = f"{command} {shlex.join(step.words)}"
    inside = is_ours and page.in_process and not SHELL.search(command)
    status, printed = (call_here if inside else call_shell)(page, command)
    assert status == step.status, f"{page.name}: $ {command}\nexit {status}\n{printed}"
    assert "Traceback" not in printed, f"{page.name}: $ {command}\n{printed}"
    compare(page, step, printed)


def call_here(page, command):
    """Run a vitrine command in this process: the command line's own `main`, without its start."""
    from jobs.cli import main

    output, errors, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = shlex.split(command, comments=True)
    try:
        with (
            contextlib.chdir(page.folder),
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(errors),
        ):
            main()
    except SystemExit as stop:
        return stop.code or 0, output.getvalue() + errors.getvalue()
    finally:
        sys.argv = before
    raise AssertionError(f"{command} did not exit")


def call_shell(page, command):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=page.folder,
        env=os.environ | {"PATH": path} | page.environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def compare(page, step, printed):
    """Check that what is shown is found in what was printed, in order; learn the runs' names."""
    lines = [squeeze(line.replace(f"{page.folder}/", "")) for line in printed.splitlines()]
    place = 0
    for shown in map(squeeze, step.shown):
        if not shown.strip("…"):
            continue
        pattern = build_pattern(shown, same_counts=not step.words)
        found = [n for n in range(place, len(lines)) if pattern.fullmatch(lines[n])]
        assert found, f"{page.name}: $ {step.command}\nshows: {shown}\nprinted:\n{printed}"
        place = found[0] + 1
        real = re.findall(RUN_NAME, lines[found[0]])
        page.runs |= dict(zip(re.findall(RUN_NAME, shown), real, strict=False))


def squeeze(line):
    return " ".join(BORDERS.sub(" ", line).replace(f"{SHOWN_FOLDER}/", "").split())


def build_pattern(shown, *, same_counts):
    """What a shown line stands for: itself, but for what may differ."""
    parts, end = [], 0
    for one in MASKED.finditer(shown):
        if one.lastgroup == "whole" and same_counts:
            continue
        parts += [re.escape(shown[end : one.start()]), PATTERNS[one.lastgroup]]
        end = one.end()
    return re.compile("".join([*parts, re.escape(shown[end:])]))
