"""The contrastive loss of the MIM towers, as Vitrine reconstructs it.

The papers' exact equations are not known to us. What is here is ours: InfoNCE over the
batch, in both directions, with rows of the same product as positives of each other.
"""

import torch


def contrastive_loss(
    queries: torch.Tensor,
    keys: torch.Tensor,
    logit_scale: torch.Tensor | float,
    product_ids: torch.Tensor,
) -> torch.Tensor:
    """Contrast two roles of the same products over one batch, in both directions.

    Row i's positives P(i) are all rows j of its product, i itself among them; all others,
    N(i), are negatives. With s = logit_scale * queries @ keys.T,

        loss(i) = mean over j in P(i) of -log(e^s_ij / (e^s_ij + sum over n in N(i) of e^s_in))

    so that positives never push each other away. Where every product occurs once, this is
    exactly the symmetric InfoNCE of CLIP. The result is the mean over i and both directions.

    Args:
        queries: (B, D) float unit rows.
        keys: (B, D) float unit rows; row i is the same product as queries[i].
        logit_scale: 1 / temperature (not its logarithm), a scalar.
        product_ids: (B,) int64.

    Returns:
        A scalar float32, >= 0, differentiable.

    Raises:
        ValueError: The shapes don't fit together.
    """
    if queries.ndim != 2 or queries.shape != keys.shape:
        raise ValueError(
            f"queries {tuple(queries.shape)} and keys {tuple(keys.shape)}, expected the same (B, D)"
        )
    if product_ids.shape != queries.shape[:1]:
        raise ValueError(f"product_ids {tuple(product_ids.shape)}, expected ({len(queries)},)")
    logits = logit_scale * queries.float() @ keys.float().T
    positives = product_ids[:, None] == product_ids[None, :]
    return 0.5 * (_one_direction(logits, positives) + _one_direction(logits.T, positives))


def _one_direction(logits: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """Average the loss of each row of (B, B) float logits; (B, B) bool marks positives."""
    # The smallest finite number instead of -inf: a batch of one product then has loss and
    # gradient 0, not NaN.
    masked = logits.masked_fill(positives, torch.finfo(logits.dtype).min)
    negatives = masked.logsumexp(dim=1, keepdim=True)
    each = (torch.logaddexp(logits, negatives) - logits) * positives
    return (each.sum(dim=1) / positives.sum(dim=1)).mean()
