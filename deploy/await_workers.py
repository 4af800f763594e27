"""Wait until a cluster has workers, hold its GPUs, then become the command: run it on the head.

    python await_workers.py --cpus 32 --gpus 1 -- vitrine refresh --config job.yaml

A job counts the CPUs and GPUs of its cluster when a stage starts, and embeds on CPUs if there is no
GPU then; an autoscaler starts a GPU worker only when something asks for one. The GPUs that are
asked for here stay until the cluster ends; more of them, up to `embed.actors`, come and go with the
embedding. Exit status: the command's; 1 if the workers did not come, 2 usage.
"""

import argparse
import os
import sys
import time

import ray
from ray.autoscaler.sdk import request_resources

POLL_S = 5.0


def await_workers(*, cpus: int, gpus: int, timeout_s: float) -> str | None:
    """Ask the autoscaler for GPUs, and wait for what was asked.

    Args:
        cpus: Least CPUs of all workers together.
        gpus: Least GPUs; these are held until the cluster ends.
        timeout_s: How long to wait.

    Returns:
        What is missing, None if nothing is.
    """
    request_resources(bundles=[{"GPU": 1}] * gpus)
    deadline = time.monotonic() + timeout_s
    while True:
        there = ray.cluster_resources()
        if there.get("CPU", 0) >= cpus and there.get("GPU", 0) >= gpus:
            return None
        if time.monotonic() >= deadline:
            return (
                f"after {timeout_s:,.0f} s the cluster has {there.get('CPU', 0):g} of {cpus} CPUs "
                f"and {there.get('GPU', 0):g} of {gpus} GPUs; nothing was started"
            )
        time.sleep(POLL_S)


def main() -> None:
    """Wait, then replace this process, so that signals and the exit status are the command's."""
    parser = argparse.ArgumentParser(description="Wait for workers, then run a command.")
    parser.add_argument("--cpus", type=int, default=1, help="Least CPUs of all workers.")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs to start and hold.")
    parser.add_argument("--timeout-s", type=float, default=1200, help="How long to wait.")
    parser.add_argument("command", nargs="+", help="After --.")
    wanted = parser.parse_args()
    try:
        ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    except ConnectionError as error:
        sys.exit(f"await_workers: error: no Ray cluster here: {' '.join(str(error).split())}")
    missing = await_workers(cpus=wanted.cpus, gpus=wanted.gpus, timeout_s=wanted.timeout_s)
    ray.shutdown()
    if missing:
        sys.exit(f"await_workers: error: {missing}")
    os.execvp(wanted.command[0], wanted.command)


if __name__ == "__main__":
    main()
