"""What is done for machines that die or refuse, where one Ray is enough to see it."""

import logging
import time

import pytest

from jobs import machines
from jobs.errors import StoreError
from jobs.storage import storage_errors
from jobs.tasks import LostError


def test_own_ray_begins_nothing_again(local_ray):
    tries = []

    def work():
        tries.append(1)
        raise LostError("a worker died")

    began = time.monotonic()
    with pytest.raises(LostError):
        machines.without_cut_off(work, [], tries.append)
    assert tries == [1]
    assert time.monotonic() - began < 5  # no machine of it can be missed


def test_machine_that_dies_while_it_is_asked_is_left_out(local_ray, tmp_path, caplog):
    gone = {"NodeID": "f0" * 28, "NodeManagerHostname": "gone", "NodeManagerAddress": "10.0.0.9"}
    with caplog.at_level(logging.WARNING):
        assert machines._answer(gone, machines._ask(gone, [str(tmp_path / "none")])) == []
    (record,) = caplog.records
    assert record.message.startswith("vitrine: machine gone (10.0.0.9) was lost, the run goes on: ")


def test_refusal_on_one_machine_names_none(local_ray):
    with pytest.raises(StoreError) as caught, storage_errors("s3://b/x", "read"):
        raise PermissionError("Access Denied")
    assert str(caught.value) == "s3://b/x can't be read: Access Denied"
