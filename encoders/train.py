"""Train the MIM 3-tower model in one process.

Our reconstruction of MIM's 3-tower loss, not the paper's equations: with unit vectors q_i
(query image), p_i (product image) and p_t (product text),

    NCE(q_i, p_i) + text_loss_weight * (NCE(q_i, p_t) + NCE(p_i, p_t))

The two image roles share one tower. Image-image and image-text pairs each have a learned
temperature, since their similarities spread differently.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from encoders.encoder import channel_statistics, normalize_pixels, pick_device
from encoders.losses import contrastive_loss
from encoders.spec import Int64Array, PreprocessSpec, UInt8Array

# CLIP's own start and ceiling of the temperature (Radford et al. 2021, section 2.5).
_FIRST_LOG_SCALE = math.log(1 / 0.07)
_MAX_LOG_SCALE = math.log(100)
_MAX_GRADIENT_NORM = 1.0
_ADAM_BETAS = (0.9, 0.98)


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """Say how long and how hard to train.

    Attributes:
        steps: Optimizer steps.
        batch_size: Rows of every batch; it fixes the number of negatives.
        learning_rate: Of AdamW, at its peak.
        warmup_steps: Steps of linear rise, before a cosine falls to 0.
        weight_decay: Of AdamW, on matrices only.
        text_loss_weight: Lambda, the weight of the two image-text terms.
        seed: Seeds torch.

    Raises:
        ValueError: A value is out of range.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 1e-4
    warmup_steps: int = 50
    weight_decay: float = 0.1
    text_loss_weight: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 2:
            raise ValueError("steps has to be 1 or more, and batch_size 2 or more")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}, expected 0 to steps")
        if self.learning_rate <= 0 or self.weight_decay < 0 or self.text_loss_weight < 0:
            raise ValueError("learning_rate has to be above 0, and no weight below 0")


@dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """Hold B pairs of a query picture and its product.

    Attributes:
        query_pixels: (B, H, W, 3) uint8 in [0, 255].
        product_pixels: (B, H, W, 3) uint8 in [0, 255].
        product_tokens: (B, L) int64.
        product_ids: (B,) int64; rows of one product are positives of each other.
    """

    query_pixels: UInt8Array
    product_pixels: UInt8Array
    product_tokens: Int64Array
    product_ids: Int64Array


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Report one optimizer step.

    Attributes:
        step: From 1 to steps.
        loss: The weighted sum that was minimised.
        image_loss: NCE(q_i, p_i).
        text_loss: NCE(q_i, p_t) + NCE(p_i, p_t), unweighted.
        image_scale: 1 / temperature of image-image pairs.
        text_scale: 1 / temperature of image-text pairs.
        learning_rate: Used in this step.
        gradient_norm: Before clipping.
    """

    step: int
    loss: float
    image_loss: float
    text_loss: float
    image_scale: float
    text_scale: float
    learning_rate: float
    gradient_norm: float


def train_mim(
    model: torch.nn.Module,
    batches: Iterable[TrainBatch],
    spec: TrainSpec,
    preprocess: PreprocessSpec,
    *,
    device: str | None = None,
) -> Iterator[StepMetrics]:
    """Train a model in place, one step each time the iterator is advanced.

    The model is in training mode during a step only; between steps, and afterwards, it is
    in evaluation mode, ready to be measured or saved. On cuda the towers run in bf16.

    Args:
        model: An open_clip CLIP or CustomTextCLIP. Its logit_scale is the image-text one.
        batches: At least spec.steps batches of spec.batch_size rows.
        spec: How to train. torch's global generator is seeded with spec.seed.
        preprocess: The model's preprocessing: mean and std are read.
        device: A torch device; None is "cuda" where there is one, else "cpu".

    Yields:
        The metrics of each step.

    Raises:
        ValueError: A batch has another number of rows, the batches end too early, or the
            loss is not finite.
    """
    torch.manual_seed(spec.seed)
    trainer = _Trainer(model, spec, preprocess, pick_device(device))
    source = iter(batches)
    for step in range(1, spec.steps + 1):
        batch = next(source, None)
        if batch is None:
            raise ValueError(f"the batches ended after {step - 1} of {spec.steps} steps")
        yield trainer.run_step(step, batch)


def learning_rate_at(step: int, spec: TrainSpec) -> float:
    """Return the learning rate of a step (from 1): a linear rise, then half a cosine."""
    if step <= spec.warmup_steps:
        return spec.learning_rate * step / spec.warmup_steps
    progress = (step - spec.warmup_steps) / max(1, spec.steps - spec.warmup_steps + 1)
    return spec.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


class _Trainer:
    """Keep what lives from step to step: weights, temperatures, the optimizer's moments."""

    def __init__(
        self,
        model: torch.nn.Module,
        spec: TrainSpec,
        preprocess: PreprocessSpec,
        device: torch.device,
    ) -> None:
        self._spec, self._device = spec, device
        self._model: Any = model.to(device).to(memory_format=torch.channels_last)
        self._mean, self._std = channel_statistics(preprocess, device)
        first = torch.tensor(_FIRST_LOG_SCALE, device=device)
        self._image_log_scale = torch.nn.Parameter(first)
        self._text_log_scale: Any = self._model.logit_scale
        self._parameters = [*model.parameters(), self._image_log_scale]
        self._optimizer = _build_optimizer(self._parameters, spec)

    def run_step(self, step: int, batch: TrainBatch) -> StepMetrics:
        """Do one step of forward, backward and update."""
        learning_rate = learning_rate_at(step, self._spec)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._model.train()
        image_loss, text_loss = self._losses(batch)
        loss = image_loss + self._spec.text_loss_weight * text_loss
        if not torch.isfinite(loss):
            raise ValueError(f"the loss of step {step} is not finite: lower the learning rate")
        gradient_norm = self._update(loss)
        self._model.eval()
        return StepMetrics(
            step=step,
            loss=loss.item(),
            image_loss=image_loss.item(),
            text_loss=text_loss.item(),
            image_scale=self._image_log_scale.exp().item(),
            text_scale=self._text_log_scale.exp().item(),
            learning_rate=learning_rate,
            gradient_norm=gradient_norm,
        )

    def _losses(self, batch: TrainBatch) -> tuple[torch.Tensor, torch.Tensor]:
        query_images, product_images, product_texts = self._encode(batch)
        ids = torch.as_tensor(batch.product_ids, device=self._device)
        image_scale = self._image_log_scale.exp()
        text_scale = self._text_log_scale.exp()
        image_loss = contrastive_loss(query_images, product_images, image_scale, ids)
        text_loss = contrastive_loss(
            query_images, product_texts, text_scale, ids
        ) + contrastive_loss(product_images, product_texts, text_scale, ids)
        return image_loss, text_loss

    def _encode(self, batch: TrainBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (B, D) float32 unit rows of query images, product images, product texts."""
        _check_batch(batch, self._spec.batch_size)
        # One pass for both image roles, so that batch statistics cover both domains.
        pixels = torch.cat(
            [torch.as_tensor(batch.query_pixels), torch.as_tensor(batch.product_pixels)]
        ).to(self._device)
        tokens = torch.as_tensor(batch.product_tokens, device=self._device)
        on_cuda = self._device.type == "cuda"
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=on_cuda):
            images = self._model.encode_image(normalize_pixels(pixels, self._mean, self._std))
            texts = self._model.encode_text(tokens)
        queries, products = F.normalize(images.float(), dim=-1).chunk(2)
        return queries, products, F.normalize(texts.float(), dim=-1)

    def _update(self, loss: torch.Tensor) -> float:
        """Apply the gradient of the loss; return its norm before clipping."""
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, _MAX_GRADIENT_NORM)
        self._optimizer.step()
        with torch.no_grad():
            self._image_log_scale.clamp_(0, _MAX_LOG_SCALE)
            self._text_log_scale.clamp_(0, _MAX_LOG_SCALE)
        return norm.item()


def _build_optimizer(parameters: list[torch.nn.Parameter], spec: TrainSpec) -> torch.optim.AdamW:
    """Build AdamW that decays matrices, and neither biases nor norms nor temperatures."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=spec.learning_rate, betas=_ADAM_BETAS)


def _check_batch(batch: TrainBatch, batch_size: int) -> None:
    rows = [
        len(array)
        for array in (
            batch.query_pixels,
            batch.product_pixels,
            batch.product_tokens,
            batch.product_ids,
        )
    ]
    if any(count != batch_size for count in rows):
        raise ValueError(f"a batch has {rows} rows, expected {batch_size} of each")
