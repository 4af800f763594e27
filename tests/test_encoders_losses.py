import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from encoders.encoder import build_model
from encoders.losses import contrastive_loss
from encoders.spec import PreprocessSpec
from encoders.train import TrainBatch, TrainSpec, learning_rate_at, train_mim

torch.set_num_threads(1)

CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"layers": 1, "width": 64, "patch_size": 8, "image_size": 32},
    "text_cfg": {"context_length": 6, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}
PREPROCESS = PreprocessSpec(
    size_px=32, resize_mode="squash", interpolation="bicubic", mean=(0.5,) * 3, std=(0.25,) * 3
)


def make_units(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, 8, generator=generator), dim=1)


def test_distinct_products_give_symmetric_infonce():
    queries, keys = make_units(6, 0), make_units(6, 1)
    logits, labels = 10 * queries @ keys.T, torch.arange(6)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(contrastive_loss(queries, keys, 10.0, labels), expected)


def test_rows_of_one_product_are_not_negatives():
    vectors = make_units(3, 0)[torch.tensor([0, 0, 1, 2])]
    ids = torch.tensor([7, 7, 8, 9])
    as_one = contrastive_loss(vectors, vectors, 100.0, ids)
    as_two = contrastive_loss(vectors, vectors, 100.0, torch.arange(4))
    assert as_one < 1e-3
    assert as_two > 0.3


def test_rows_of_one_product_attract_each_other():
    queries = make_units(3, 0).requires_grad_()
    keys = make_units(3, 1)
    contrastive_loss(queries, keys, 1.0, torch.tensor([0, 0, 1])).backward()
    moved = F.normalize(queries - 0.1 * queries.grad, dim=1)
    assert moved[0] @ keys[1] > queries[0] @ keys[1]
    assert moved[0] @ keys[2] < queries[0] @ keys[2]


def test_batch_of_one_product_has_no_loss_and_finite_gradients():
    queries = make_units(3, 0).requires_grad_()
    loss = contrastive_loss(queries, make_units(3, 1), 100.0, torch.zeros(3, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert (queries.grad == 0).all()


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="same"):
        contrastive_loss(make_units(3, 0), make_units(4, 0), 1.0, torch.arange(3))
    with pytest.raises(ValueError, match="product_ids"):
        contrastive_loss(make_units(3, 0), make_units(3, 0), 1.0, torch.arange(4))


def make_batches(batch_size=8, seed=0):
    """Yield products that are one colour each; a query is a noisy photo of it."""
    rng = np.random.default_rng(seed)
    colors = rng.integers(0, 256, (12, 1, 1, 3))
    while True:
        ids = rng.choice(12, batch_size)
        clean = np.broadcast_to(colors[ids], (batch_size, 32, 32, 3))
        noisy = np.clip(clean + rng.integers(-30, 31, clean.shape), 0, 255)
        tokens = np.zeros((batch_size, 6), dtype=np.int64)
        tokens[:, 0], tokens[:, 1], tokens[:, 2] = 62, ids, 63
        yield TrainBatch(
            query_pixels=noisy.astype(np.uint8),
            product_pixels=clean.astype(np.uint8),
            product_tokens=tokens,
            product_ids=ids.astype(np.int64),
        )


def run_training(steps=30, **changes):
    model = build_model(CONFIG, seed=0)
    spec = TrainSpec(steps=steps, batch_size=8, learning_rate=2e-3, warmup_steps=3, **changes)
    return model, list(train_mim(model, make_batches(), spec, PREPROCESS, device="cpu"))


def test_loss_decreases_over_thirty_steps():
    model, metrics = run_training()
    losses = [metric.loss for metric in metrics]
    assert [metric.step for metric in metrics] == list(range(1, 31))
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    assert metrics[-1].text_loss < metrics[0].text_loss
    assert metrics[-1].image_scale != metrics[-1].text_scale
    assert all(1 <= metric.text_scale <= 100.001 for metric in metrics)
    assert not model.training


def test_training_is_the_same_for_the_same_seed():
    assert run_training(steps=3)[1] == run_training(steps=3)[1]


def test_text_loss_weight_of_zero_is_image_only():
    for metric in run_training(steps=3, text_loss_weight=0.0)[1]:
        assert metric.loss == metric.image_loss


def test_too_few_batches_and_wrong_batch_sizes_are_refused():
    spec = TrainSpec(steps=3, batch_size=8, warmup_steps=0)
    few = itertools.islice(make_batches(), 2)
    with pytest.raises(ValueError, match="ended after 2 of 3"):
        list(train_mim(build_model(CONFIG), few, spec, PREPROCESS, device="cpu"))
    with pytest.raises(ValueError, match="expected 8"):
        list(train_mim(build_model(CONFIG), make_batches(4), spec, PREPROCESS, device="cpu"))


def test_learning_rate_rises_then_falls_to_nearly_nothing():
    spec = TrainSpec(steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate_at(step, spec) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 0.001
