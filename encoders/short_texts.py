"""Encodes short texts without the padding behind them.

A causal text tower takes a text's vector at its last token, which sees no token after it; a Hugging
Face tower masks the padding. So the vector is that of the full width, but for rounding; and the
tower does a fifth of the work for a title of 15 tokens in a context of 77.

Letters: B rows, L tokens.
"""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import TextTransformer
from torch import nn

from encoders.spec import Int64Array

STEP_TOKENS = 16  # widths are multiples of it, so that a batch is divided into few groups


class ShortTexts:
    """An open_clip model whose text tower is run at the width that its texts need."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401 - open_clip has no types
        """Look at what kind of text tower a model has.

        Args:
            model: A CLIP, CustomTextCLIP or CoCa, where and as it will run.
        """
        self._model = model
        self._narrow: dict[int, Any] = {}

    def groups(self, tokens: Int64Array) -> Iterator[tuple[npt.NDArray[np.int64], Any, Int64Array]]:
        """Divide texts by the width that they need.

        Args:
            tokens: (B, L) int64.

        Yields:
            The places of a group's rows; the model to encode them with, by `encode_text`; and
            their tokens, no wider than need be. Every row is in one group.
        """
        needed = self._count(tokens)
        widths = np.minimum(-(-needed // STEP_TOKENS) * STEP_TOKENS, tokens.shape[1])
        for width in np.unique(widths).tolist():
            places = np.flatnonzero(widths == width)
            yield places, self._at(width, tokens.shape[1]), tokens[places, :width]

    def _count(self, tokens: Int64Array) -> Int64Array:
        """Return how many tokens of each row the tower's answer depends on: (B,) int64."""
        whole = np.full(len(tokens), tokens.shape[1], np.int64)
        text = getattr(self._model, "text", None)
        if isinstance(text, HFTextEncoder):
            behind = np.argmax((tokens != text.config.pad_token_id)[:, ::-1], axis=1)
            return np.asarray(whole - behind, np.int64)
        if isinstance(text, TextTransformer):
            bare = text.cls_emb is None and not text.use_pad_mask
            causal, pool, end = text.attn_mask is not None and bare, text.pool_type, text.eos_id
        elif text is None and hasattr(self._model, "text_pool_type"):
            causal, pool = self._model.attn_mask is not None, self._model.text_pool_type
            end = getattr(self._model, "text_eos_id", None)
        else:
            return whole
        if not causal or pool not in ("argmax", "eos"):
            return whole
        last = np.argmax(tokens if pool == "argmax" else tokens == end, axis=1)
        return np.asarray(last + 1, np.int64)

    def _at(self, width: int, full: int) -> Any:  # noqa: ANN401
        """Return the model for a width: the same weights, the tables cut to it."""
        if width == full or isinstance(getattr(self._model, "text", None), HFTextEncoder):
            return self._model
        if width not in self._narrow:
            self._narrow[width] = _cut(self._model, width)
        return self._narrow[width]


def _cut(model: Any, width: int) -> Any:  # noqa: ANN401
    """Return a shallow copy: it shares every weight, so that threads may use both at once."""
    short = copy.copy(model)
    if "text" in model._modules:
        short._modules = model._modules | {"text": _cut(model.text, width)}
        return short
    table = nn.Parameter(model.positional_embedding[:width], requires_grad=False)
    short._parameters = model._parameters | {"positional_embedding": table}
    short._buffers = model._buffers | {"attn_mask": model.attn_mask[:width, :width]}
    return short
