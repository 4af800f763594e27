import numpy as np
import pytest

from encoders.augment import augment_photo


def photo(height=80, width=100, seed=0):
    ramp = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
    noise = np.random.default_rng(seed).integers(0, 20, (height, width, 3))
    return np.clip(ramp * 0.8 + noise, 0, 255).astype(np.uint8)


def test_same_draws_give_the_same_photo():
    one, two, other = (augment_photo(photo(), 48, np.random.default_rng(s)) for s in (1, 1, 2))
    assert one.shape == (48, 48, 3)
    assert one.dtype == np.uint8
    assert (one == two).all()
    assert (one != other).any()


def test_the_photo_itself_stays_as_it_was():
    before = photo()
    kept = before.copy()
    before.flags.writeable = False
    augment_photo(before, 48, np.random.default_rng(0))
    assert (before == kept).all()


def test_half_are_flipped_and_none_is_upside_down():
    ramp = photo()
    flipped = sum(
        float(a[:, :24].mean()) > float(a[:, 24:].mean())
        for a in (augment_photo(ramp, 48, np.random.default_rng(s)) for s in range(200))
    )
    assert 70 < flipped < 130
    down = ramp.transpose(1, 0, 2)
    for seed in range(50):
        made = augment_photo(down, 48, np.random.default_rng(seed))
        assert made[:24].mean() < made[24:].mean()


def test_colours_change_but_stay_near():
    grey = np.full((60, 60, 3), 120, np.uint8)
    levels = [augment_photo(grey, 48, np.random.default_rng(s)).mean() for s in range(100)]
    assert np.std(levels) > 5
    assert 120 * 0.65 < min(levels) < max(levels) < 120 * 1.35


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (2, 3)])
def test_photos_of_odd_shapes(shape):
    for seed in range(30):
        made = augment_photo(photo(*shape), 16, np.random.default_rng(seed))
        assert made.shape == (16, 16, 3)
