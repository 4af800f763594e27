"""The MSR model: a query's text tower against the fused text and image of a product.

After "Multimodal semantic retrieval for product search" (arXiv 2501.07365), whose exact model is
not known to us; this is our reconstruction:

    msr3   query = text(q);                    product = fuse(text(t), image(i))
    msr4   query = [text(q) ; clip_text(q)];   product = fuse(text(t), image(i))

`text` is one bi-encoder for queries and product texts; in msr3 it is the CLIP model's own text
tower, in msr4 a tower beside it. Where the product is a concatenation, an msr3 query is
[text(q) ; text(q)]. A missing text or image is a learned unit vector, trained by dropping
modalities at random, never a zero.

Letters: B rows, D dimension of one tower, L tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_MISSING_STD = 0.02


class MsrModel(nn.Module):
    """Towers, the learned vectors of a missing modality, and the learned fusion if it is one."""

    def __init__(
        self,
        clip: nn.Module,
        dim: int,
        kind: str,
        *,
        text: nn.Module | None = None,
        text_tokens: int = 0,
    ) -> None:
        """Put towers together; the fusion starts as the sum (or pair) of the parts.

        Args:
            clip: An open_clip model: the image tower, and the text tower of msr3.
            dim: D of every tower.
            kind: "concat", "alpha_concat" or "mlp".
            text: The bi-encoder of msr4; None is msr3.
            text_tokens: How many of an msr4 query's tokens are the bi-encoder's.

        Raises:
            ValueError: Another kind.
        """
        super().__init__()
        if kind not in ("concat", "alpha_concat", "mlp"):
            raise ValueError(f"fusion is {kind!r}, expected concat, alpha_concat or mlp for msr")
        self.clip, self.text, self.kind, self.text_tokens = clip, text, kind, text_tokens
        self.fused_dim = dim if kind == "mlp" and text is None else 2 * dim
        self.missing_image = nn.Parameter(torch.randn(dim) * _MISSING_STD)
        self.missing_text = nn.Parameter(torch.randn(dim) * _MISSING_STD)
        self.mlp: nn.Sequential | None = None
        if kind == "mlp":
            last = nn.Linear(2 * dim, self.fused_dim)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.mlp = nn.Sequential(nn.Linear(2 * dim, 2 * dim), nn.GELU(), last)

    def encode_query(self, tokens: torch.Tensor) -> torch.Tensor:
        """Encode queries.

        Args:
            tokens: (B, L) int64; in msr4 the bi-encoder's tokens, then the CLIP text tower's.

        Returns:
            (B, fused_dim) float32 unit rows.
        """
        if self.text is None:
            words = self._texts(self._clip_text, tokens)
            return words if self.fused_dim == words.shape[1] else _pair(words, words, 0.5)
        words = self._texts(self.text, tokens[:, : self.text_tokens])
        return _pair(words, self._texts(self._clip_text, tokens[:, self.text_tokens :]), 0.5)

    def encode_parts(
        self,
        images: torch.Tensor | None,
        tokens: torch.Tensor | None,
        has_image: torch.Tensor,
        has_text: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode the two parts of products.

        Args:
            images: (B, 3, H, W) float; rows without an image may hold anything.
            tokens: (B, L) int64 of the bi-encoder; rows without a text may hold anything.
            has_image: (B,) bool.
            has_text: (B,) bool.

        Returns:
            Text and image, each (B, D) float32 unit rows: learned vectors where there is none.
        """
        text = _unit(self.missing_text).expand(len(has_text), -1)
        image = _unit(self.missing_image).expand(len(has_image), -1)
        # Only true rows enter a tower: a text of padding alone has a mean of NaN, and so has its
        # gradient; a blank picture would move batch statistics. But while training, all weights
        # take part in every step, since ranks wait for each other's gradients and statistics: the
        # text towers by the queries, the image tower by two blank pictures if need be.
        if tokens is not None and has_text.any():
            tower = self.text if self.text is not None else self._clip_text
            text = text.index_put((has_text,), self._texts(tower, tokens[has_text]))
        if images is not None and (self.training or has_image.any()):
            seen = has_image
            if not has_image.any():
                seen = torch.arange(len(has_image), device=has_image.device) < 2
            pictures = _unit(self._model.encode_image(images[seen]).float())
            true = torch.where(has_image[seen][:, None], pictures, image[seen])
            image = image.index_put((seen,), true)
        return text, image

    def fuse(self, text: torch.Tensor, image: torch.Tensor, image_weight: float) -> torch.Tensor:
        """Fuse the parts of products, (B, D) each, into (B, fused_dim) unit rows.

        Args:
            text: (B, D) float32 unit rows.
            image: (B, D) float32 unit rows.
            image_weight: Share of the image; only "alpha_concat" has one.

        Returns:
            (B, fused_dim) float32 unit rows.
        """
        if self.mlp is None:
            return _pair(text, image, 0.5 if self.kind == "concat" else image_weight)
        both = torch.cat([text, image], dim=1)
        start = both if self.fused_dim == both.shape[1] else text + image
        return _unit((start + self.mlp(both)).float())

    @property
    def _model(self) -> Any:  # noqa: ANN401 - open_clip has no types
        return self.clip

    def _clip_text(self, tokens: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self._model.encode_text(tokens)
        return features

    def _texts(self, tower: Any, tokens: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        return _unit(tower(tokens).float())


def _pair(text: torch.Tensor, image: torch.Tensor, image_weight: float) -> torch.Tensor:
    return _unit(torch.cat([(1 - image_weight) * text, image_weight * image], dim=1))


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return F.normalize(rows, dim=-1)
