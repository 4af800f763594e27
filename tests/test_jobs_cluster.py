"""What dies in a Ray cluster ends in one line; a bug stays a traceback."""

import os
import signal
import socket
import time

import pytest
import ray

from jobs.cluster import ray_session
from jobs.config import RayConfig
from jobs.errors import JobError, StoreError
from jobs.tasks import WATCH_S, gather, gather_bounded, ray_errors, run_telling, watch


@pytest.fixture(scope="module")
def own_ray():
    """Not the one of the other modules: its processes are killed."""
    with ray_session(RayConfig(object_store_mb=100)):
        yield


@ray.remote(num_cpus=1, max_retries=0)
def die():
    os.kill(os.getpid(), signal.SIGKILL)


@ray.remote(num_cpus=1)
def wait_for(*values):
    return values


@ray.remote(num_cpus=1)
def fail(error):
    raise error


@ray.remote(num_cpus=0)
class Actor:
    def __init__(self, error=None):
        if error is not None:
            raise error

    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("chained", [False, True])
def test_worker_that_dies(own_ray, chained):
    reference = wait_for.remote(die.remote()) if chained else die.remote()
    with pytest.raises(JobError, match=r"worker process died; what was committed stays") as caught:
        gather([reference])
    assert "\n" not in str(caught.value)
    assert "embed.actors" in str(caught.value)


def test_worker_that_dies_among_many(own_ray):
    with pytest.raises(JobError, match="worker process died"):
        list(gather_bounded(lambda call: call(), [wait_for.remote, die.remote], in_flight=2))


def test_actor_that_dies(own_ray):
    with pytest.raises(JobError, match="actor process died"), ray_errors():
        ray.get(Actor.remote().die.remote())


def test_error_of_ours_keeps_its_type(own_ray):
    with pytest.raises(StoreError, match=r"^it is damaged$"):
        gather([wait_for.remote(fail.remote(StoreError("it is damaged")))])


def test_error_of_ours_in_an_actors_start(own_ray):
    with pytest.raises(JobError, match=r"^it is damaged$"), ray_errors():
        ray.get(Actor.remote(StoreError("it is damaged")).die.remote())


def test_bug_is_no_job_error(own_ray):
    with pytest.raises(KeyError):
        gather([fail.remote(KeyError("a bug"))])
    with pytest.raises(ray.exceptions.ActorDiedError), ray_errors():
        ray.get(Actor.remote(KeyError("a bug")).die.remote())


@ray.remote(num_cpus=1, max_retries=0)
def tell_and(work):
    yield from run_telling(work)


def test_a_task_tells_its_newest_words_and_then_its_result(own_ray):
    def work(tell):
        tell("begun")
        tell("half")
        time.sleep(WATCH_S + 1)
        return "result", 1

    words = []
    assert watch(lambda: tell_and.remote(work), "wait", words.append) == ("result", 1)
    assert words == ["half"]


def test_a_telling_task_that_fails_or_dies(own_ray):
    def fail(tell):
        raise StoreError("it is damaged")

    with pytest.raises(StoreError, match=r"^it is damaged$"):
        watch(lambda: tell_and.remote(fail), "wait", print)
    with pytest.raises(JobError, match="worker process died"):
        watch(
            lambda: tell_and.remote(lambda tell: os.kill(os.getpid(), signal.SIGKILL)),
            "wait",
            print,
        )


def test_a_telling_task_that_was_lost_is_done_again(own_ray, tmp_path):
    """Also where the second try tells fewer words than the first."""

    def work(tell):
        tell("begun")
        if not (tmp_path / "tried").exists():
            (tmp_path / "tried").touch()
            time.sleep(WATCH_S + 1)
            os.kill(os.getpid(), signal.SIGKILL)
        return "result", 1

    words = []
    assert watch(lambda: tell_and.remote(work), "wait", words.append) == ("result", 1)
    assert words[0] == "begun"
    assert words[1].startswith("try again: a Ray worker process died")


def test_who_waits_for_cpus_says_so(own_ray):
    busy, words = [hold.remote() for _ in range(max(2, os.cpu_count() or 2))], []
    ray.wait(busy, num_returns=1, timeout=1)
    task = tell_and.remote(lambda tell: ("result", 1))
    assert watch(lambda: task, "wait for a machine", words.append) == ("result", 1)
    assert words == ["wait for a machine"]


@ray.remote(num_cpus=1)
def hold():
    time.sleep(3 * WATCH_S)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (None, "nothing answers there"),
        ("127.0.0.1:99999", "can't be used: "),
        ("nonsense", "can't be used: Invalid address"),
    ],
)
def test_cluster_that_is_not_there(address, words, monkeypatch):
    monkeypatch.setattr("jobs.cluster.CONNECT_S", 1.0)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    address, started = address or f"127.0.0.1:{free_port()}", time.monotonic()
    with (
        pytest.raises(JobError, match=f"the Ray cluster at {address} .*{words}"),
        ray_session(RayConfig(address=address)),
    ):
        pytest.fail("there is no such cluster")
    assert time.monotonic() - started < 20
