import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.losses import contrastive_loss
from encoders.objectives import MAX_LOG_SCALE, PRESETS, Objective

torch.set_num_threads(1)


def make_units(rows, seed, dim=5):
    rng = np.random.default_rng(seed)
    units = rng.normal(size=(rows, dim))
    return units / np.linalg.norm(units, axis=1, keepdims=True)


def reference_loss(queries, keys, scale, products, asked=None, negatives=None, their=()):
    """Sum the docstring's formula row by row, in float64."""
    rows = range(len(queries))
    if not len(queries):
        return 0.0
    asked = list(rows) if asked is None else asked

    def answers(i, product):
        return any(asked[m] == asked[i] and products[m] == product for m in rows)

    def one_row(scores, positives, others):
        total = sum(math.exp(score) for score in others)
        each = [-math.log(math.exp(scores[j]) / (math.exp(scores[j]) + total)) for j in positives]
        return sum(each) / len(each)

    forward = backward = 0.0
    for i in rows:
        scores = [scale * queries[i] @ keys[j] for j in rows]
        right = [j for j in rows if answers(i, products[j])]
        others = [scores[j] for j in rows if j not in right]
        if negatives is not None:
            others += [
                scale * queries[i] @ negatives[m]
                for m in range(len(negatives))
                if not answers(i, their[m])
            ]
        forward += one_row(scores, right, others)
        scores = [scale * queries[j] @ keys[i] for j in rows]
        right = [j for j in rows if answers(j, products[i])]
        backward += one_row(scores, right, [scores[j] for j in rows if j not in right])
    return (forward + backward) / 2 / len(queries)


def difference_gradient(function, at, step=1e-6):
    gradient = np.zeros_like(at)
    for place in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[place] += step
        down[place] -= step
        gradient[place] = (function(up) - function(down)) / (2 * step)
    return gradient


def check_against_reference(products, *, asked=None, their=None, scale=4.0, seed=0):
    """Compare value and gradient (of queries, keys, scale and negatives) with the reference's."""
    rows = len(products)
    arrays = [make_units(rows, seed), make_units(rows, seed + 1), np.array(scale)]
    if their is not None:
        arrays.append(make_units(len(their), seed + 2))

    def reference(values):
        negatives = values[3] if their is not None else None
        return reference_loss(*values[:3], products, asked, negatives, their or ())

    tensors = [torch.tensor(a, dtype=torch.float32, requires_grad=True) for a in arrays]
    loss = contrastive_loss(
        *tensors[:3],
        torch.tensor(products, dtype=torch.int64),
        query_ids=None if asked is None else torch.tensor(asked, dtype=torch.int64),
        negatives=tensors[3] if their is not None else None,
        negative_ids=None if their is None else torch.tensor(their, dtype=torch.int64),
    )
    loss.backward()
    assert loss.item() == pytest.approx(reference(arrays), abs=2e-5)
    for place, tensor in enumerate(tensors):
        expected = difference_gradient(
            lambda value, place=place: reference([*arrays[:place], value, *arrays[place + 1 :]]),
            arrays[place],
        )
        found = np.zeros_like(expected) if tensor.grad is None else tensor.grad.numpy()
        np.testing.assert_allclose(found, expected, atol=5e-5)


@pytest.mark.parametrize(
    ("products", "asked", "their"),
    [
        ([0, 1, 2, 3], None, None),
        ([0, 0, 1, 2, 1], None, None),
        ([0, 1, 2, 3], [0, 1, 1, 2], None),
        ([0, 1, 1, 2], [5, 5, 6, 7], None),
        ([0, 1, 2], None, [7, 8, 0, 2, 9]),
        ([0, 1, 2], [3, 3, 4], [7, 0, 1, 2]),
        ([0, 1], None, []),
        ([3], None, None),
        ([3], [0], [3, 4]),
        ([1, 1, 1], None, [1]),
    ],
    ids=lambda value: "none" if value is None else "-".join(map(str, value)) or "empty",
)
def test_value_and_gradient_equal_the_reference(products, asked, their):
    check_against_reference(products, asked=asked, their=their)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_small_batch_equals_the_reference(data):
    rows = data.draw(st.integers(1, 4))
    small = st.integers(0, 3)
    check_against_reference(
        data.draw(st.lists(small, min_size=rows, max_size=rows)),
        asked=data.draw(st.none() | st.lists(small, min_size=rows, max_size=rows)),
        their=data.draw(st.none() | st.lists(small, max_size=3)),
        scale=data.draw(st.sampled_from([1.0, 3.0, 8.0])),
        seed=data.draw(st.integers(0, 99)),
    )


def as_float32(array):
    return torch.tensor(array, dtype=torch.float32)


def test_distinct_products_give_symmetric_infonce():
    queries, keys = as_float32(make_units(6, 0)), as_float32(make_units(6, 1))
    logits, labels = 10 * queries @ keys.T, torch.arange(6)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(contrastive_loss(queries, keys, 10.0, labels), expected)


def test_rows_of_one_product_are_not_negatives():
    vectors = as_float32(make_units(3, 0))[torch.tensor([0, 0, 1, 2])]
    as_one = contrastive_loss(vectors, vectors, 100.0, torch.tensor([7, 7, 8, 9]))
    as_two = contrastive_loss(vectors, vectors, 100.0, torch.arange(4))
    assert as_one < 1e-3
    assert as_two > 0.3


def test_product_of_an_equal_query_is_no_negative_under_another_query():
    # Rows 0 and 1 ask the same and get A and B; row 2 asks something else, and gets B again.
    queries = torch.eye(4)[torch.tensor([0, 0, 1])]
    keys = torch.eye(4)[torch.tensor([2, 3, 3])].requires_grad_()
    ids, asked = torch.tensor([0, 1, 1]), torch.tensor([5, 5, 6])
    contrastive_loss(queries, keys, 1.0, ids, query_ids=asked).backward()
    assert queries[0] @ keys.grad[2] == 0  # B answers rows 0 and 1 as well: nothing pushes it off
    assert queries[2] @ keys.grad[0] > 0  # nobody said that A answers row 2


def test_batch_of_one_product_has_no_loss_and_finite_gradients_at_the_ceiling():
    queries = as_float32(make_units(3, 0)).requires_grad_()
    ids = torch.zeros(3, dtype=torch.int64)
    loss = contrastive_loss(queries, as_float32(make_units(3, 1)), 100.0, ids)
    loss.backward()
    assert loss.item() == 0
    assert (queries.grad == 0).all()


def test_no_rows_give_zero_and_reach_both_roles():
    nothing = [torch.zeros(0, 5, requires_grad=True) for _ in range(2)]
    scale = torch.tensor(3.0, requires_grad=True)
    loss = contrastive_loss(*nothing, scale, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert all(tensor.grad is not None for tensor in nothing)
    assert scale.grad == 0


def test_shapes_that_do_not_fit_are_refused():
    three, four, ids = torch.ones(3, 5), torch.ones(4, 5), torch.arange(3)
    for arguments, options, message in [
        ((three, four, 1.0, ids), {}, "same"),
        ((three, three, 1.0, torch.arange(4)), {}, "product_ids"),
        ((three, three, 1.0, ids), {"query_ids": torch.arange(2)}, "query_ids"),
        ((three, three, 1.0, ids), {"negatives": three}, "come together"),
        (
            (three, three, 1.0, ids),
            {"negatives": torch.ones(3, 4), "negative_ids": ids},
            r"expected \(M, 5\)",
        ),
        ((three, three, 1.0, ids), {"negatives": four, "negative_ids": ids}, "one a negative"),
    ]:
        with pytest.raises(ValueError, match=message):
            contrastive_loss(*arguments, **options)


TERMS = {
    "image_only": [("query_image", "product_image", "image-image")],
    "mim3": [
        ("query_image", "product_text", "image-text"),
        ("product_image", "product_text", "image-text"),
    ],
    "mim4": [
        ("query_text", "product_image", "image-text"),
        ("query_text", "product_text", "text-text"),
        ("fused", "product_image", "fused-image"),
    ],
}
SCALES = {"image-image": 3.0, "image-text": 5.0, "text-text": 7.0, "fused-image": 2.0}


def reference_mim(preset, roles, labels, text_weight, image_weight):
    names = list(TERMS)[: list(TERMS).index(preset) + 1]
    total = 0.0
    for name in names:
        for query, key, kind in TERMS[name]:
            there = np.ones(len(labels["product_ids"]), bool)
            if query in ("query_text", "fused"):
                there &= labels["has_query_text"]
            if key == "product_text":
                there &= labels["has_product_text"]
            if query == "fused":
                blend = (
                    image_weight * roles["query_image"] + (1 - image_weight) * roles["query_text"]
                )
                queries = blend / np.linalg.norm(blend, axis=1, keepdims=True)
            else:
                queries = roles[query]
            asked = labels["query_ids"][there] if query == "query_text" else None
            loss = reference_loss(
                queries[there], roles[key][there], SCALES[kind], labels["product_ids"][there], asked
            )
            total += loss * (1 if kind == "image-image" else text_weight)
    return total


@pytest.mark.parametrize("has_text", ["all", "some", "none"])
@pytest.mark.parametrize("preset", ["image_only", "mim3", "mim4"])
def test_mim_objectives_are_the_weighted_sum_of_their_terms(preset, has_text):
    pattern = {"all": [1, 1, 1, 1, 1, 1], "some": [1, 1, 0, 1, 0, 1], "none": [0] * 6}[has_text]
    labels = {
        "product_ids": np.array([0, 1, 1, 2, 3, 4]),
        "query_ids": np.array([0, 1, 2, 1, 4, 5]),
        "has_query_text": np.array(pattern, bool),
        "has_product_text": np.array(pattern[::-1], bool),
    }
    names = ("query_image", "product_image", "product_text", "query_text")
    roles = {name: make_units(6, seed) for seed, name in enumerate(names)}
    objective = Objective(preset, text_loss_weight=0.4, query_image_weight=0.7)
    assert set(objective.log_scales) == {term.kind for term in PRESETS[preset]}
    with torch.no_grad():
        for kind, scale in objective.log_scales.items():
            scale.fill_(math.log(SCALES[kind]))
    features = {name: as_float32(rows).requires_grad_() for name, rows in roles.items()}
    loss, terms = objective(features, {k: torch.from_numpy(v) for k, v in labels.items()})
    assert loss.item() == pytest.approx(reference_mim(preset, roles, labels, 0.4, 0.7), abs=1e-4)
    assert len(terms) == len(PRESETS[preset])
    loss.backward()
    for role in {role for term in PRESETS[preset] for role in (term.query, term.key)}:
        if role != "fused_query":
            assert torch.isfinite(features[role].grad).all()
    without = ~labels["has_product_text"]
    if preset == "mim3":
        assert (features["product_text"].grad[torch.from_numpy(without)] == 0).all()


@pytest.mark.parametrize("preset", ["msr3", "msr4"])
def test_msr_objective_is_one_term_with_mined_negatives(preset):
    queries, products, negatives = make_units(3, 0), make_units(3, 1), make_units(6, 2)
    ids, asked, their = [0, 1, 2], [4, 4, 5], [0, 1, 8, 9, 2, 7]
    objective = Objective(preset, text_loss_weight=0.1, query_image_weight=0.5)
    roles = {"query": queries, "product": products, "negative": negatives}
    labels = {"product_ids": ids, "query_ids": asked, "negative_ids": their}
    loss, terms = objective(
        {name: as_float32(rows) for name, rows in roles.items()},
        {name: torch.tensor(values) for name, values in labels.items()},
    )
    expected = reference_loss(queries, products, 1 / 0.07, ids, asked, negatives, their)
    assert loss.item() == pytest.approx(expected, abs=1e-4)
    assert list(terms) == ["query-product"]


def test_temperatures_are_clamped():
    objective = Objective("mim4", text_loss_weight=1.0, query_image_weight=0.5)
    with torch.no_grad():
        for value, scale in zip((-3.0, 9.0, 2.0, 5.0), objective.log_scales.values(), strict=True):
            scale.fill_(value)
    objective.clamp_scales()
    found = [scale.item() for scale in objective.log_scales.values()]
    assert found == pytest.approx([0, MAX_LOG_SCALE, 2, MAX_LOG_SCALE])
    assert math.exp(MAX_LOG_SCALE) == pytest.approx(100)


def test_products_known_to_be_right_are_no_negatives():
    units = (make_units(3, 0), make_units(3, 1), make_units(2, 2))
    queries, keys, negatives = (torch.as_tensor(rows).float() for rows in units)
    ids, negative_ids = torch.tensor([1, 2, 3]), torch.tensor([8, 9])
    right = torch.tensor([[1, 2, 8], [2, -1, -1], [3, -1, -1]])
    options = {"negatives": negatives, "negative_ids": negative_ids}
    found = contrastive_loss(queries, keys, 5.0, ids, right_ids=right, **options)
    score = (5 * queries @ keys.T).exp()
    wrong = (5 * queries @ negatives.T).exp()
    rows = [
        [(score[0, j], score[0, 2] + wrong[0, 1]) for j in (0, 1)],
        [(score[1, 1], score[1, 0] + score[1, 2] + wrong[1].sum())],
        [(score[2, 2], score[2, 0] + score[2, 1] + wrong[2].sum())],
    ]
    columns = [
        [(score[0, 0], score[1, 0] + score[2, 0])],
        [(score[i, 1], score[2, 1]) for i in (0, 1)],
        [(score[2, 2], score[0, 2] + score[1, 2])],
    ]
    each = [
        torch.stack([-(s / (s + others)).log() for s, others in pairs]).mean()
        for pairs in (*rows, *columns)
    ]
    torch.testing.assert_close(found, torch.stack(each).mean())
