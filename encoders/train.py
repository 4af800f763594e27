"""Train towers by a preset's loss, in one process or in every process of a group.

The group is torch.distributed's, if one was started: each rank encodes its share of the batch,
features are gathered over all ranks with their gradients, and every rank computes the loss of
the whole batch. So the number of ranks changes neither loss nor gradient.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_gather
from torch.nn.parallel import DistributedDataParallel

from encoders.objectives import PRESETS, Objective, Tensors, lock_tower
from encoders.towers import pick_device

_ADAM_BETAS = (0.9, 0.98)  # as CLIP (Radford et al. 2021, table 18)
# Adam moves a parameter by about its learning rate a step: at the towers' rate a logarithm of a
# temperature would not get anywhere in the hundreds of steps of a fine-tuning.
_SCALE_RATE = 10.0
_LOCKS = ("none", "image", "text")
_PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """Say how long and how hard to train.

    Attributes:
        preset: "image_only", "mim3", "mim4", "msr3" or "msr4".
        steps: Optimizer steps.
        batch_size: Rows of a batch over all ranks; it fixes the number of negatives.
        accumulate: Parts that a rank's share of a batch is encoded in, to save memory; the
            negatives stay those of the whole batch.
        learning_rate: Of AdamW, at its peak.
        warmup_steps: Steps of linear rise, before a cosine falls to 0.
        weight_decay: Of AdamW, on matrices only.
        max_gradient_norm: Longer gradients are clipped to it.
        text_loss_weight: Weight of the terms with a text.
        query_image_weight: Share of the photo in the fused query of mim4.
        lock: "none", or the tower that stays as it is: "image" or "text".
        gradient_checkpointing: Whether activations are computed twice to save memory.
        precision: "fp32", "bf16" (autocast), or "auto": bf16 on cuda, else fp32.
        seed: Seeds torch, anew for each step.

    Raises:
        ValueError: A value is out of range.
    """

    preset: str = "mim3"
    steps: int = 1000
    batch_size: int = 64
    accumulate: int = 1
    learning_rate: float = 1e-4
    warmup_steps: int = 50
    weight_decay: float = 0.1
    max_gradient_norm: float = 1.0
    text_loss_weight: float = 0.5
    query_image_weight: float = 0.5
    lock: str = "none"
    gradient_checkpointing: bool = False
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        choices = (
            ("preset", self.preset, tuple(PRESETS)),
            ("lock", self.lock, _LOCKS),
            ("precision", self.precision, _PRECISIONS),
        )
        for name, value, known in choices:
            if value not in known:
                raise ValueError(f"{name} is {value!r}, expected one of {known}")
        if self.steps < 1 or self.accumulate < 1 or self.batch_size < 2:
            raise ValueError("steps and accumulate have to be 1 or more, batch_size 2 or more")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}, expected 0 to {self.steps}")
        if min(self.learning_rate, self.max_gradient_norm) <= 0:
            raise ValueError("learning_rate and max_gradient_norm have to be above 0")
        if min(self.weight_decay, self.text_loss_weight, self.seed) < 0:
            raise ValueError("weight_decay, text_loss_weight and seed can't be negative")
        if self.lock == "image" and self.preset == "image_only":
            raise ValueError("image_only trains the image tower: it can't be locked")


@dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """One rank's share of a batch, on the CPU.

    Attributes:
        inputs: What the towers take: see `MimTowers.forward` and `MsrTowers.forward`.
        labels: What the objective takes: see `Objective.forward`.
    """

    inputs: Tensors
    labels: Tensors


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """What one step showed.

    Attributes:
        step: From 1.
        loss: Of the whole batch.
        terms: Loss of each term before its weight.
        scales: 1 / temperature of each kind of pair, after the step.
        learning_rate: Of this step.
        gradient_norm: Before clipping.
    """

    step: int
    loss: float
    terms: dict[str, float]
    scales: dict[str, float]
    learning_rate: float
    gradient_norm: float


def learning_rate_at(step: int, spec: TrainSpec) -> float:
    """Return the learning rate of a step (from 1): a linear rise, then half a cosine."""
    if step <= spec.warmup_steps:
        return spec.learning_rate * step / spec.warmup_steps
    progress = (step - spec.warmup_steps) / max(1, spec.steps - spec.warmup_steps + 1)
    return spec.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


class Trainer:
    """Keep what lives from step to step: weights, temperatures, the optimizer's moments."""

    def __init__(
        self, towers: torch.nn.Module, spec: TrainSpec, *, device: str | None = None
    ) -> None:
        """Put the towers on a device, and wrap them for the group if there is one.

        Args:
            towers: `MimTowers` or `MsrTowers`; trained in place.
            spec: How to train.
            device: A torch device; None is "cuda" where there is one, else "cpu".
        """
        self.spec, self.step = spec, 0
        self._device = pick_device(device)
        self._grouped = dist.is_initialized() and dist.get_world_size() > 1
        self._rank = dist.get_rank() if self._grouped else 0
        self._locked = self._prepare(towers)
        self._towers = towers.to(self._device).to(memory_format=torch.channels_last)
        self._wrapped = self._towers
        if self._grouped:
            if self._device.type == "cuda":
                convert: Any = torch.nn.SyncBatchNorm.convert_sync_batchnorm
                self._towers = convert(self._towers)
            self._wrapped = DistributedDataParallel(self._towers)
        self._objective = Objective(
            spec.preset,
            text_loss_weight=spec.text_loss_weight,
            query_image_weight=spec.query_image_weight,
        ).to(self._device)
        learned = [p for p in self._towers.parameters() if p.requires_grad]
        scales = list(self._objective.parameters())
        self._parameters = [*learned, *scales]
        self._optimizer = _build_optimizer(learned, scales, spec)

    def _prepare(self, towers: Any) -> list[torch.nn.Module]:  # noqa: ANN401 - either towers
        clip = getattr(towers.model, "clip", towers.model)
        for name in ("logit_scale", "logit_bias"):  # ours are in the objective
            if getattr(clip, name, None) is not None:
                getattr(clip, name).requires_grad_(False)
        if hasattr(clip, "text_decoder"):  # CoCa's captions: no term reads them
            clip.text_decoder.requires_grad_(False)
        if self.spec.gradient_checkpointing:
            for tower in (clip, getattr(towers.model, "text", None)):  # msr4 has a text tower more
                if tower is not None:
                    tower.set_grad_checkpointing(True)
        return [] if self.spec.lock == "none" else lock_tower(clip, self.spec.lock)

    def run_step(self, batch: TrainBatch) -> StepMetrics:
        """Do one step of forward, backward and update; all ranks together.

        Raises:
            ValueError: The loss is not finite.
        """
        self.step += 1
        # Anew for each step, so that a run that goes on from a checkpoint draws the same.
        torch.manual_seed((self.spec.seed * 1_000_003 + self.step) * 4099 + self._rank)
        rate = learning_rate_at(self.step, self.spec)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["rate"]
        loss, terms = self._backward(batch)
        if not math.isfinite(loss):
            raise ValueError(f"the loss of step {self.step} is not finite: lower the learning rate")
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.spec.max_gradient_norm)
        self._optimizer.step()
        self._objective.clamp_scales()
        self._wrapped.eval()
        return StepMetrics(
            step=self.step,
            loss=loss,
            terms=terms,
            scales={kind: s.exp().item() for kind, s in self._objective.log_scales.items()},
            learning_rate=rate,
            gradient_norm=norm.item(),
        )

    def gradients(self, batch: TrainBatch) -> tuple[float, dict[str, torch.Tensor]]:
        """Return the loss of a batch and its gradient by parameter, without an update."""
        loss, _ = self._backward(batch)
        self._wrapped.eval()
        named = [*self._towers.named_parameters(), *self._objective.named_parameters()]
        return loss, {name: p.grad.clone() for name, p in named if p.grad is not None}

    def state(self) -> dict[str, Any]:
        """Return all that a killed run needs to go on as if nothing had happened."""
        return {
            "step": self.step,
            "towers": self._towers.state_dict(),
            "objective": self._objective.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            ValueError: It is another run's.
        """
        try:
            self._towers.load_state_dict(state["towers"])
            self._objective.load_state_dict(state["objective"])
            self._optimizer.load_state_dict(state["optimizer"])
        except (KeyError, RuntimeError) as error:
            raise ValueError("the saved training state is another run's") from error
        self.step = int(state["step"])

    def _backward(self, batch: TrainBatch) -> tuple[float, dict[str, float]]:
        self._wrapped.train()
        for module in self._locked:
            module.eval()
        self._optimizer.zero_grad(set_to_none=True)
        labels = {name: self._gather(t.to(self._device)) for name, t in batch.labels.items()}
        parts = _split(batch.inputs, self.spec.accumulate, len(batch.labels["product_ids"]))
        if len(parts) == 1:
            features = self._encode(parts[0])
            loss, terms = self._loss(features, labels)
            torch.autograd.backward(loss)
        else:
            loss, terms = self._backward_in_parts(parts, labels)
        return loss.item(), {name: term.item() for name, term in terms.items()}

    def _backward_in_parts(
        self, parts: list[Tensors], labels: Tensors
    ) -> tuple[torch.Tensor, Tensors]:
        """Get the gradient of all features first, then send it through the towers part by part.

        The loss is that of the whole batch; each part is encoded twice. As GradCache (Gao et al.
        2021) and open_clip's --accum-freq.
        """
        seeds = torch.randint(2**62, (len(parts),)).tolist()
        with torch.no_grad():
            first = [self._encode(part, seed) for part, seed in zip(parts, seeds, strict=True)]
        joined = {
            role: torch.cat([features[role] for features in first]).requires_grad_()
            for role in first[0]
        }
        loss, terms = self._loss(joined, labels)
        torch.autograd.backward(loss)
        ends = {role: 0 for role in joined}
        for number, (part, seed) in enumerate(zip(parts, seeds, strict=True)):
            with self._quiet(last=number == len(parts) - 1):
                features = self._encode(part, seed)
                tensors, gradients = [], []
                for role, rows in features.items():
                    start, ends[role] = ends[role], ends[role] + len(rows)
                    gradient = joined[role].grad
                    if gradient is not None and rows.requires_grad:  # else: a locked tower's
                        tensors.append(rows)
                        gradients.append(gradient[start : ends[role]])
                torch.autograd.backward(tensors, gradients)
        return loss, terms

    def _quiet(self, *, last: bool) -> AbstractContextManager[Any]:
        """Let the ranks exchange their gradients only once, after the last part."""
        if isinstance(self._wrapped, DistributedDataParallel) and not last:
            return self._wrapped.no_sync()
        return nullcontext()

    def _encode(self, inputs: Tensors, seed: int | None = None) -> Tensors:
        if seed is not None:  # the second pass of a part drops out what the first one did
            torch.manual_seed(seed)
        bf16 = self.spec.precision == "bf16" or (
            self.spec.precision == "auto" and self._device.type == "cuda"
        )
        placed = {name: t.to(self._device, non_blocking=True) for name, t in inputs.items()}
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=bf16):
            features: Tensors = self._wrapped(placed)
        return features

    def _loss(self, features: Tensors, labels: Tensors) -> tuple[torch.Tensor, Tensors]:
        joined = {role: self._gather(rows) for role, rows in features.items()}
        loss: tuple[torch.Tensor, Tensors] = self._objective(joined, labels)
        return loss

    def _gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Join the rows of all ranks, with their gradients."""
        if not self._grouped:
            return rows
        if rows.requires_grad:
            gather: Any = all_gather  # torch gives it no types
            return torch.cat(gather(rows.contiguous()))
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)


def _split(inputs: Tensors, parts: int, rows: int) -> list[Tensors]:
    """Cut a batch into parts of whole rows; a row keeps its own mined negatives.

    Arrays of P = B + M rows hold B products, then M negatives, M / B of each product in turn.
    """
    if parts == 1:
        return [inputs]
    if rows % parts:
        raise ValueError(f"{rows} rows can't be cut into accumulate = {parts} equal parts")
    size = rows // parts
    cut: list[Tensors] = []
    for start in range(0, rows, size):
        part = {}
        for name, tensor in inputs.items():
            each = (len(tensor) - rows) // rows
            own = tensor[start : start + size]
            more = tensor[rows + start * each : rows + (start + size) * each]
            part[name] = torch.cat([own, more])
        cut.append(part)
    return cut


def _build_optimizer(
    towers: list[torch.nn.Parameter], scales: list[torch.nn.Parameter], spec: TrainSpec
) -> torch.optim.AdamW:
    """Build AdamW that decays matrices, and neither biases nor norms nor temperatures."""
    groups = [
        {
            "params": [p for p in towers if p.ndim >= 2],
            "weight_decay": spec.weight_decay,
            "rate": 1.0,
        },
        {"params": [p for p in towers if p.ndim < 2], "weight_decay": 0.0, "rate": 1.0},
        {"params": scales, "weight_decay": 0.0, "rate": _SCALE_RATE},
    ]
    return torch.optim.AdamW(groups, lr=spec.learning_rate, betas=_ADAM_BETAS)
