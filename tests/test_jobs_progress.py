"""What a command shows while it works, on a real pseudo-terminal and in a pipe."""

import contextlib
import os
import pty
import re
import subprocess
import sys
import threading
import time

import pytest
import ray

from jobs.errors import JobError
from jobs.progress import Counter, Progress, open_progress
from jobs.steps import StepClock
from jobs.tasks import gather, gather_bounded

SHOWN = """
import sys, time
from jobs.progress import Progress
with Progress(quiet="-q" in sys.argv) as progress:
    progress.stage("embed [bold]x[/bold] of /a/very/long/path" + "/folder" * 20)
    with progress.count(40) as shown:
        for done in range(0, 41, 10):
            shown.update(done, rejected=2)
            time.sleep(0.4 if "--slowly" in sys.argv else 0)
    progress.wait("start something")
    progress.stage("index image")
    progress.step("image: train")
    progress.far("image: train lists", 1, 5)
    progress.step("image: measure")
print("the result")
"""
LONG = "embed [bold]x[/bold] of /a/very/long/path" + "/folder" * 20
TERMINAL = {"TERM": "xterm-256color", "COLUMNS": "200"}


class Terminal:
    """A pseudo-terminal; what is written to it is kept."""

    def __init__(self):
        self._master, self.slave = pty.openpty()
        self._text = b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        while True:
            try:
                found = os.read(self._master, 65_536)
            except OSError:  # nobody holds the other end any more
                return
            self._text += found
            if not found:
                return

    def close(self):
        """Close it and return all that was written."""
        os.close(self.slave)
        self._reader.join()
        os.close(self._master)
        return self._text.decode()


def run_on_terminal(*arguments, **environment):
    """Run with standard error on a terminal; return standard output and what the terminal got."""
    terminal = Terminal()
    done = subprocess.run(
        [sys.executable, "-c", SHOWN, *arguments],
        env=plain_environment() | TERMINAL | environment,
        stdout=subprocess.PIPE,
        stderr=terminal.slave,
        text=True,
        check=True,
    )
    return done.stdout, terminal.close()


def plain_environment():
    names = ("NO_COLOR", "FORCE_COLOR", "TERM", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
    return {name: value for name, value in os.environ.items() if name not in names}


def run_in_pipe(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", SHOWN, *arguments],
        env=plain_environment() | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout, done.stderr


def test_pipe_gets_whole_lines_and_no_control_character():
    out, err = run_in_pipe()
    assert out == "the result\n"
    lines = err.splitlines()
    assert lines[0] == f"vitrine: {LONG}"
    assert re.fullmatch(r"  40 of 40 rows, [\d,.]+/s, 2 rejected", lines[1])
    assert lines[2:] == ["vitrine: index image", "  image: train", "  image: measure"]
    assert err.replace("\n", "").isprintable()


def test_terminal_gets_a_bar_with_rate_and_time_left():
    out, err = run_on_terminal("--slowly")
    assert out == "the result\n"
    assert re.search(r"20 of 40 rows, [\d,.]+/s, 2 rejected, 0:00:0\d left", err)
    assert "━" in err
    assert "start something" in err
    assert "1 of 5" in err
    assert "image: train lists" in err
    assert "[bold]x[/bold]" in err.replace("\r\n", "")
    assert err.endswith("\x1b[2K")  # the live line is taken away
    assert err.count("\x1b[?25l") == err.count("\x1b[?25h") > 0  # and the cursor is there again


@pytest.mark.parametrize("run", [run_in_pipe, run_on_terminal])
def test_quiet_shows_nothing(run):
    assert run("-q") == ("the result\n", "")


def test_dumb_terminal_gets_lines():
    err = run_on_terminal(TERM="dumb")[1]
    assert "\x1b" not in err
    assert "40 of 40 rows" in err


def test_no_color_is_respected():
    colours = re.compile(r"\x1b\[[0-9;]*[0-9]m")
    plain, coloured = run_on_terminal(NO_COLOR="1")[1], run_on_terminal()[1]
    codes = {code for code in colours.findall(plain)}
    assert codes <= {"\x1b[0m", "\x1b[1m", "\x1b[2m"}  # bold and dim are no colours
    assert {code for code in colours.findall(coloured)} - codes


def test_forced_colour_draws_nothing_in_a_pipe():
    err = run_in_pipe(FORCE_COLOR="1")[1]
    assert re.sub(r"\x1b\[[0-9;]*m", "", err).replace("\n", "").isprintable()


def test_counter_tells_rate_and_time_left():
    counter = Counter(1000, "rows")
    assert counter.describe(200) == "200 of 1,000 rows"  # start-up says nothing of the rate
    time.sleep(0.2)
    told = counter.describe(300, "3 rejected")
    match = re.fullmatch(r"300 of 1,000 rows, (\d+)/s, 3 rejected, 0:00:0(\d) left", told)
    assert 250 < float(match[1]) <= 500
    assert int(match[2]) == round(700 / float(match[1]))
    assert counter.describe(1000).endswith("/s")
    assert "left" not in counter.describe(1000)


def test_progress_outside_of_a_command_shows_nothing(capfd):
    assert not open_progress().draws
    with Progress() as progress:
        assert open_progress() is progress
        with open_progress().tasks(3) as tell:
            tell(2)
    assert open_progress() is not progress
    assert capfd.readouterr() == ("", "")


def test_steps_are_timed_and_shown_once(capfd):
    clock = StepClock("image", Progress())
    for words in ("train IVF4", "train lists, 1 of 9", "train lists, 2 of 9", "measure"):
        clock.begin(f"image: {words}")
    clock.end()
    assert list(clock.seconds) == ["train", "measure"]
    assert capfd.readouterr().err == "  image: train IVF4\n  image: measure\n"


@contextlib.contextmanager
def shown_on_terminal():
    """Let standard error be a terminal; yield an open progress, and a list that gets the text."""
    made, shown = Terminal(), []
    with pytest.MonkeyPatch.context() as patch, open(made.slave, "w", closefd=False) as err:
        for name in ("NO_COLOR", "FORCE_COLOR"):
            patch.delenv(name, raising=False)
        for name, value in TERMINAL.items():
            patch.setenv(name, value)
        patch.setattr(sys, "stderr", err)
        with Progress() as progress:
            yield progress, shown
    shown.append(made.close())


def test_tasks_of_ray_are_counted_on_a_terminal(local_ray):
    square = ray.remote(lambda value: time.sleep(0.3 * value) or value * value)
    with shown_on_terminal() as (progress, shown):
        progress.stage("square")
        assert gather([square.remote(n) for n in (3, 0, 1)]) == [9, 0, 1]
        assert list(gather_bounded(square.remote, [1, 2, 3], in_flight=2)) == [1, 4, 9]
    assert re.search(r"[12] of 3 tasks, [\d.]+/s, 0:00:0\d left", shown[0])
    assert re.search(r"1 of 3 tasks.*2 of 3 tasks", shown[0], re.DOTALL)


def test_task_that_fails_ends_the_wait_on_a_terminal_too(local_ray):
    def work(seconds):
        if not seconds:
            raise JobError("this one failed")
        time.sleep(seconds)

    task, began = ray.remote(work), time.monotonic()
    with shown_on_terminal() as (progress, _):
        progress.stage("fail")
        with pytest.raises(JobError, match="this one failed"):
            gather([task.remote(8), task.remote(0)])
    assert time.monotonic() - began < 7


def test_a_full_disk_behind_stderr_does_not_end_the_job():
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", SHOWN], stdout=subprocess.PIPE, stderr=full, check=False
        )
    assert (done.returncode, done.stdout) == (0, b"the result\n")


def test_nobody_who_reads_stderr_does_not_end_the_job():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", SHOWN], stdout=subprocess.PIPE, stderr=writing, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stdout) == (0, b"the result\n")


def test_a_terminal_that_is_gone_does_not_end_the_job():
    master, slave = pty.openpty()
    environment = os.environ | TERMINAL
    with subprocess.Popen(
        [sys.executable, "-c", SHOWN, "--slowly"],
        stdout=subprocess.PIPE,
        stderr=slave,
        env=environment,
    ) as child:
        os.close(slave)
        assert os.read(master, 1)
        os.close(master)
        assert child.communicate(timeout=60)[0] == b"the result\n"
    assert child.returncode == 0
