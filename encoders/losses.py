"""The contrastive loss of all presets, as Vitrine reconstructs it.

The papers' exact equations are not known to us. What is here is ours: InfoNCE over the
batch, in both directions, with rows of the same product as positives of each other.
"""

import torch


def contrastive_loss(
    queries: torch.Tensor,
    keys: torch.Tensor,
    logit_scale: torch.Tensor | float,
    product_ids: torch.Tensor,
    *,
    query_ids: torch.Tensor | None = None,
    right_ids: torch.Tensor | None = None,
    negatives: torch.Tensor | None = None,
    negative_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Contrast two roles of the same products over one batch, in both directions.

    Key j answers query i if some row that asks what row i asks has product j: so all rows of i's
    product do, and all of a product that another row, or `right_ids`, gives for i's query. These
    are P(i), i itself among them; all others, N(i), are negatives. With
    s = logit_scale * queries @ keys.T,

        loss(i) = mean over j in P(i) of -log(e^s_ij / (e^s_ij + sum over n in N(i) of e^s_in))

    so that positives never push each other away. Where every product occurs once, this is
    exactly the symmetric InfoNCE of CLIP. The result is the mean over i and both directions: from
    keys to queries, P(j) are the queries that j answers. Mined negatives join N(i) in the direction
    from queries to keys, except those that answer query i.

    Args:
        queries: (B, D) float unit rows.
        keys: (B, D) float unit rows; row i is the same product as queries[i].
        logit_scale: 1 / temperature (not its logarithm), a scalar.
        product_ids: (B,) int64.
        query_ids: (B,) int64; rows of one id asked the same. None: all rows asked differently.
        right_ids: (B, R) int64, products that are known from beyond the batch to answer a row's
            query, padded with -1. None: the batch says it all.
        negatives: (M, D) float unit rows, further keys. None: the batch's own alone.
        negative_ids: (M,) int64, the products of `negatives`.

    Returns:
        A scalar float32, >= 0, differentiable; 0 for B = 0.

    Raises:
        ValueError: The shapes don't fit together.
    """
    _check_shapes(queries, keys, product_ids, query_ids, negatives, negative_ids)
    if right_ids is not None and (right_ids.ndim != 2 or len(right_ids) != len(queries)):
        raise ValueError(f"right_ids {tuple(right_ids.shape)}, expected ({len(queries)}, R)")
    if len(queries) == 0:
        # 0 with a gradient of 0 for both roles: their towers take part in every step.
        return logit_scale * (queries.float().sum() + keys.float().sum())
    logits = logit_scale * queries.float() @ keys.float().T
    positives = _answers(product_ids, product_ids, query_ids, right_ids)
    more = None
    if negatives is not None and negative_ids is not None:
        right = _answers(product_ids, negative_ids, query_ids, right_ids)
        more = _mask(logit_scale * queries.float() @ negatives.float().T, right)
    return 0.5 * (_one_direction(logits, positives, more) + _one_direction(logits.T, positives.T))


def _answers(
    product_ids: torch.Tensor,
    key_ids: torch.Tensor,
    query_ids: torch.Tensor | None,
    right_ids: torch.Tensor | None,
) -> torch.Tensor:
    """Say which of K keys, by product, answer which of B queries: (B, K) bool."""
    answers = product_ids[:, None] == key_ids[None, :]
    if query_ids is not None:
        same_query = query_ids[:, None] == query_ids[None, :]
        answers = same_query.float() @ answers.float() > 0
    if right_ids is not None:
        answers = answers | (right_ids[:, :, None] == key_ids[None, None, :]).any(dim=1)
    return answers


def _one_direction(
    logits: torch.Tensor, positives: torch.Tensor, more: torch.Tensor | None = None
) -> torch.Tensor:
    """Average the loss of each row of (B, B) float logits; (B, B) bool marks positives."""
    others = _mask(logits, positives)
    if more is not None:
        others = torch.cat([others, more], dim=1)
    negatives = others.logsumexp(dim=1, keepdim=True)
    each = (torch.logaddexp(logits, negatives) - logits) * positives
    return (each.sum(dim=1) / positives.sum(dim=1)).mean()


def _mask(logits: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    # The smallest finite number instead of -inf: a batch of one product then has loss and
    # gradient 0, not NaN.
    return logits.masked_fill(where, torch.finfo(logits.dtype).min)


def _check_shapes(
    queries: torch.Tensor,
    keys: torch.Tensor,
    product_ids: torch.Tensor,
    query_ids: torch.Tensor | None,
    negatives: torch.Tensor | None,
    negative_ids: torch.Tensor | None,
) -> None:
    if queries.ndim != 2 or queries.shape != keys.shape:
        raise ValueError(
            f"queries {tuple(queries.shape)} and keys {tuple(keys.shape)}, expected the same (B, D)"
        )
    rows = queries.shape[:1]
    for name, ids in (("product_ids", product_ids), ("query_ids", query_ids)):
        if ids is not None and ids.shape != rows:
            raise ValueError(f"{name} {tuple(ids.shape)}, expected ({len(queries)},)")
    if (negatives is None) != (negative_ids is None):
        raise ValueError("negatives and negative_ids come together or not at all")
    if negatives is not None and negative_ids is not None:
        if negatives.ndim != 2 or negatives.shape[1] != queries.shape[1]:
            raise ValueError(
                f"negatives {tuple(negatives.shape)}, expected (M, {queries.shape[1]})"
            )
        if negative_ids.shape != negatives.shape[:1]:
            raise ValueError(f"negative_ids {tuple(negative_ids.shape)}, expected one a negative")
