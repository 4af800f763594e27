"""What each preset trains: towers called in roles, and weighted terms between the roles.

Our reconstruction of MIM ("Bringing Multimodality to Amazon Visual Search System", KDD 2024),
not the paper's equations. With unit vectors q_i (query image), p_i (product image), p_t (product
text), q_t (query text), f the fused query and w = text_loss_weight:

    image_only   NCE(q_i, p_i)
    mim3         image_only + w * (NCE(q_i, p_t) + NCE(p_i, p_t))
    mim4         mim3 + w * (NCE(q_t, p_i) + NCE(q_t, p_t) + NCE(f(q_i, q_t), p_i))

Both image roles share one tower, both text roles the other. The spread of similarities differs
from kind to kind of pair, so that each kind has a temperature of its own. msr3 and msr4 are one
term, NCE(query, fused product) with mined negatives: see `encoders.msr`.

A row takes part in a term only if it has both roles: a text may be missing.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from encoders.losses import contrastive_loss
from encoders.msr import MsrModel
from encoders.spec import PreprocessSpec
from encoders.towers import channel_statistics, normalize_pixels

Tensors = dict[str, torch.Tensor]

# CLIP's own start and ceiling of the temperature (Radford et al. 2021, section 2.5).
_FIRST_LOG_SCALE = math.log(1 / 0.07)
MAX_LOG_SCALE = math.log(100)


@dataclass(frozen=True)
class Term:
    """One contrastive term: two roles, and the kind of pair whose temperature it has."""

    query: str
    key: str
    kind: str

    @property
    def name(self) -> str:
        """How reports call the term."""
        return f"{self.query}-{self.key}"


_IMAGE_ONLY = (Term("query_image", "product_image", "image-image"),)
_MIM3 = (
    *_IMAGE_ONLY,
    Term("query_image", "product_text", "image-text"),
    Term("product_image", "product_text", "image-text"),
)
_MIM4 = (
    *_MIM3,
    Term("query_text", "product_image", "image-text"),
    Term("query_text", "product_text", "text-text"),
    Term("fused_query", "product_image", "fused-image"),
)
_MSR = (Term("query", "product", "query-product"),)

PRESETS: dict[str, tuple[Term, ...]] = {
    "image_only": _IMAGE_ONLY,
    "mim3": _MIM3,
    "mim4": _MIM4,
    "msr3": _MSR,
    "msr4": _MSR,
}
MSR_PRESETS = ("msr3", "msr4")


class Objective(nn.Module):
    """The learned temperatures of a preset, and its loss over the features of a whole batch."""

    def __init__(self, preset: str, *, text_loss_weight: float, query_image_weight: float) -> None:
        """Start all temperatures at CLIP's.

        Args:
            preset: A name in `PRESETS`.
            text_loss_weight: w above.
            query_image_weight: Share of the photo in the fused query of mim4.
        """
        super().__init__()
        self.terms = PRESETS[preset]
        self.log_scales = nn.ParameterDict(
            {kind: torch.tensor(_FIRST_LOG_SCALE) for kind in {t.kind: 0 for t in self.terms}}
        )
        self._text_weight, self._image_weight = text_loss_weight, query_image_weight

    def forward(self, features: Tensors, labels: Tensors) -> tuple[torch.Tensor, Tensors]:
        """Return the loss and its terms by name, each a scalar before its weight.

        Args:
            features: Role to (B, D) float32 unit rows; `negative` (M, D) beside `product`.
            labels: `product_ids`, `query_ids` (B,) int64; `has_query_text`, `has_product_text`
                (B,) bool; `negative_ids` (M,) int64 for MSR. Maybe `right_ids` (B, R) int64: see
                `contrastive_loss`.
        """
        roles = dict(features)
        if any(term.query == "fused_query" for term in self.terms):
            weight = self._image_weight
            blend = weight * roles["query_image"] + (1 - weight) * roles["query_text"]
            roles["fused_query"] = F.normalize(blend, dim=-1)
        losses = {term.name: self._term(term, roles, labels) for term in self.terms}
        total = torch.stack(
            [
                losses[t.name] * (1 if t.kind in _UNWEIGHTED else self._text_weight)
                for t in self.terms
            ]
        ).sum()
        return total, losses

    def clamp_scales(self) -> None:
        """Keep every temperature between 1 and 1/100, as open_clip's training does."""
        with torch.no_grad():
            for scale in self.log_scales.values():
                scale.clamp_(0, MAX_LOG_SCALE)

    def _term(self, term: Term, roles: Tensors, labels: Tensors) -> torch.Tensor:
        scale = self.log_scales[term.kind].exp()
        product_ids, query_ids = labels["product_ids"], labels["query_ids"]
        queries, keys = roles[term.query], roles[term.key]
        if term.kind == "query-product":
            return contrastive_loss(
                queries,
                keys,
                scale,
                product_ids,
                query_ids=query_ids,
                right_ids=labels.get("right_ids"),
                negatives=roles.get("negative"),
                negative_ids=labels.get("negative_ids"),
            )
        there = torch.ones_like(product_ids, dtype=torch.bool)
        by_words = term.query in ("query_text", "fused_query")
        if by_words:
            there = there & labels["has_query_text"]
        if term.key == "product_text":
            there = there & labels["has_product_text"]
        asked = right = None
        if term.query == "query_text":
            asked = query_ids[there]
            right = labels["right_ids"][there] if "right_ids" in labels else None
        return contrastive_loss(
            queries[there],
            keys[there],
            scale,
            product_ids[there],
            query_ids=asked,
            right_ids=right,
        )


_UNWEIGHTED = ("image-image", "query-product")


class MimTowers(nn.Module):
    """An open_clip model called in the roles that a preset needs."""

    def __init__(self, model: nn.Module, preprocess: PreprocessSpec, preset: str) -> None:
        """Wrap a model; towers that the preset does not call are frozen.

        Args:
            model: An open_clip model.
            preprocess: Its preprocessing: mean and std are read.
            preset: "image_only", "mim3" or "mim4".
        """
        super().__init__()
        self.model = model
        self._pixels = _Normalize(preprocess)
        roles = {role for term in PRESETS[preset] for role in (term.query, term.key)}
        self._texts = [r for r in ("product_text", "query_text") if r in roles]
        if not self._texts:
            for parameter in text_parameters(model):
                parameter.requires_grad_(False)

    def forward(self, inputs: Tensors) -> Tensors:
        """Encode a batch.

        Args:
            inputs: `query_pixels`, `product_pixels` (B, H, W, 3) uint8; `product_tokens`,
                `query_tokens` (B, L) int64; a row without a text has the tokens of an empty one
                (padding alone gives NaN in a Hugging Face tower, and so do its gradients).

        Returns:
            Role to (B, D) float32 unit rows.
        """
        model: Any = self.model
        # One pass for both image roles, so that batch statistics cover both domains.
        pixels = torch.cat([inputs["query_pixels"], inputs["product_pixels"]])
        images = F.normalize(model.encode_image(self._pixels(pixels)).float(), dim=-1)
        queries, products = images.chunk(2)
        features = {"query_image": queries, "product_image": products}
        if self._texts:
            tokens = [inputs[role.replace("text", "tokens")] for role in self._texts]
            texts = F.normalize(model.encode_text(torch.cat(tokens)).float(), dim=-1)
            features |= dict(zip(self._texts, texts.chunk(len(self._texts)), strict=True))
        return features


class MsrTowers(nn.Module):
    """An MSR model called for queries, their products and mined negatives."""

    def __init__(self, model: MsrModel, preprocess: PreprocessSpec, image_weight: float) -> None:
        """Wrap a model.

        Args:
            model: The model.
            preprocess: Its image tower's preprocessing.
            image_weight: Share of the image in a concatenated product.
        """
        super().__init__()
        self.model = model
        self._pixels = _Normalize(preprocess)
        self._image_weight = image_weight

    def forward(self, inputs: Tensors) -> Tensors:
        """Encode a batch.

        Args:
            inputs: `query_tokens` (B, L) int64; of products and then of M negatives, P = B + M:
                `product_pixels` (P, H, W, 3) uint8, `product_tokens` (P, L) int64,
                `has_product_image`, `has_product_text` (P,) bool.

        Returns:
            `query`, `product` (B, D) and `negative` (M, D) float32 unit rows.
        """
        queries = self.model.encode_query(inputs["query_tokens"])
        text, image = self.model.encode_parts(
            self._pixels(inputs["product_pixels"]),
            inputs["product_tokens"],
            inputs["has_product_image"],
            inputs["has_product_text"],
        )
        products = self.model.fuse(text, image, self._image_weight)
        rows = len(queries)
        return {"query": queries, "product": products[:rows], "negative": products[rows:]}


class _Normalize(nn.Module):
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, preprocess: PreprocessSpec) -> None:
        super().__init__()
        mean, std = channel_statistics(preprocess, torch.device("cpu"))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return normalize_pixels(pixels, self.mean, self.std)


def text_parameters(model: nn.Module) -> list[nn.Parameter]:
    """List the parameters of an open_clip model's text tower."""
    return [
        parameter
        for name, parameter in model.named_parameters()
        if not name.startswith(("visual.", "logit_"))
    ]


def lock_tower(model: Any, tower: str) -> list[nn.Module]:  # noqa: ANN401 - open_clip is untyped
    """Freeze a tower by open_clip's own rule, LiT-style; a timm or Hugging Face head stays free.

    Args:
        model: An open_clip model.
        tower: "image" or "text".

    Returns:
        The modules to hold in evaluation mode: neither dropout nor batch statistics move.
    """
    if tower == "image":
        model.visual.lock(unlocked_groups=0)
        return [getattr(model.visual, "trunk", model.visual)]
    text = getattr(model, "text", model)
    if text is model:
        model.lock_text_tower(unlocked_layers=0)
    else:
        text.lock(unlocked_layers=0)
    return [text.transformer]
