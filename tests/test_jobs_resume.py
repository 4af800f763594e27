"""Refreshes that are killed for real: nothing is lost, nothing half-done is visible."""

import json

import pytest
from chaos import run_kills

NOTHING_WRONG = {
    "rows_lost": 0,
    "duplicates": 0,
    "half_visible_releases": 0,
    "differences": [],
    "faults": [],
}


def check_figures(figures, *, kills):
    print(json.dumps(figures, indent=2))
    assert {name: figures[name] for name in NOTHING_WRONG} == NOTHING_WRONG
    assert figures["kills"] == kills
    # What was written and not committed when the kill came is what is embedded again: the files
    # of one commit interval, and the one that was waited for.
    assert figures["oldest_lost_s"] <= figures["oldest_lost_allowed_s"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_refreshes_go_on_and_end_like_an_uninterrupted_one(tmp_path):
    check_figures(run_kills(tmp_path, kills=4, seed=0, products=160), kills=4)


@pytest.mark.slow
@pytest.mark.timeout(10800)
def test_twenty_kills_at_random_moments_lose_nothing(tmp_path):
    check_figures(run_kills(tmp_path, kills=24, seed=0, products=400), kills=24)
