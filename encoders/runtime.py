"""Where a model runs and what it multiplies in; and how pixels get there.

Letters: B rows of all, b of a part, H W pixels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from encoders.spec import Int64Array, PreprocessSpec, UInt8Array
from encoders.towers import channel_statistics, normalize_pixels, pick_device

BoolArray = npt.NDArray[np.bool_]

# What autocast runs in bf16, and whose weights it would round anew in every forward pass: half the
# time of a ViT-B/32 on two cores (benchmarks/forward.py).
_ROUNDED = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)
_BF16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16")  # the last is ARM's
_GPU_BATCH_ROWS = 256
_CPU_BATCH_ROWS = 16  # a thread; more take memory and gain nothing (docs/performance.md)


class Runtime:
    """Where and how a model runs.

    Attributes:
        device: Where.
        precision: "fp32" or "bf16".
    """

    def __init__(self, preprocess: PreprocessSpec, device: str | None, precision: str) -> None:
        """Choose what is left open.

        Args:
            preprocess: The model's preprocessing.
            device: A torch device; None is "cuda" where there is one, else "cpu".
            precision: "fp32", "bf16", or "auto": bf16 where the device multiplies in it.

        Raises:
            ValueError: `precision` is none of the three.
        """
        self.device = pick_device(device)
        self.precision = _pick_precision(precision, self.device)
        self._size_px = preprocess.size_px
        self._mean, self._std = channel_statistics(preprocess, self.device)

    def place(self, model: Any) -> Any:  # noqa: ANN401 - the same type comes back
        """Put a model on the device, in evaluation mode and channels last; it comes back."""
        return model.eval().to(self.device).to(memory_format=torch.channels_last)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Run what is inside without gradients, in the precision."""
        bf16 = self.precision == "bf16"
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16),
        ):
            yield

    def check_pixels(self, pixels: UInt8Array) -> None:
        """Refuse pixels that are not (B, H, W, 3) uint8 of the model's size.

        Raises:
            ValueError: They are not.
        """
        check_array("pixels", pixels, (self._size_px, self._size_px, 3), np.uint8)

    def load_pixels(self, pixels: UInt8Array) -> torch.Tensor:
        """Copy (B, H, W, 3) uint8 to the device and normalise: (B, 3, H, W) float32."""
        return normalize_pixels(self.load(pixels), self._mean, self._std)

    def stream_pixels(self, pixels: UInt8Array) -> Iterator[torch.Tensor]:
        """Yield (b, 3, H, W) float32 on the device, in parts.

        On a CPU they are small and nearly of one size. On a GPU the next batch is copied, as uint8
        from pinned memory, while the last is encoded.
        """
        if self.device.type != "cuda":
            most = _CPU_BATCH_ROWS * torch.get_num_threads()
            yield from map(self.load_pixels, np.array_split(pixels, -(-len(pixels) // most)))
            return
        starts = range(0, len(pixels), _GPU_BATCH_ROWS)
        parts = [pixels[start : start + _GPU_BATCH_ROWS] for start in starts]
        copies: Any = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]  # torch's
        encoding = torch.cuda.current_stream(self.device)
        coming = self._copy_ahead(parts[0], copies)
        for number in range(len(parts)):
            encoding.wait_stream(copies)
            here = coming
            here.record_stream(encoding)
            if number + 1 < len(parts):
                coming = self._copy_ahead(parts[number + 1], copies)
            yield normalize_pixels(here, self._mean, self._std)

    def _copy_ahead(self, pixels: UInt8Array, stream: Any) -> torch.Tensor:  # noqa: ANN401
        pinned = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).pin_memory()
        with torch.cuda.stream(stream):
            return pinned.to(self.device, non_blocking=True)

    def load(self, array: UInt8Array | Int64Array | BoolArray) -> torch.Tensor:
        """Copy an array to the device as it is."""
        writable = np.require(array, requirements=["C", "W"])
        return torch.from_numpy(writable).to(self.device)


def round_weights(model: nn.Module) -> None:
    """Round a model's matrices to bf16 in place, as autocast would in each of its forward passes.

    open_clip's text tower then adds up in bf16, too: it takes the type of its weights for that.

    Args:
        model: One that encodes under bf16 autocast from now on, and isn't trained or saved again.
    """
    for module in model.modules():
        if isinstance(module, _ROUNDED):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.bfloat16()


def _pick_precision(precision: str, device: torch.device) -> str:
    if precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f"precision is {precision!r}, expected auto, fp32 or bf16")
    if precision == "auto":
        here = device.type == "cuda" or (device.type == "cpu" and _cpu_multiplies_bf16())
        return "bf16" if here else "fp32"
    return precision


def _cpu_multiplies_bf16() -> bool:
    """Whether this machine's CPU has instructions for it; without them bf16 is slower than fp32."""
    found = torch.cpu.get_capabilities()
    return any(bool(found.get(name)) for name in _BF16_INSTRUCTIONS)


def check_array(
    name: str, array: UInt8Array | Int64Array, row_shape: tuple[int, ...], dtype: type
) -> None:
    """Refuse an array that is not (B, *row_shape) of a dtype.

    Raises:
        ValueError: It is not; it is named by `name`.
    """
    if array.dtype != dtype or array.shape[1:] != row_shape or array.ndim != len(row_shape) + 1:
        expected = ", ".join(["B", *map(str, row_shape)])
        raise ValueError(
            f"{name} are {array.shape} {array.dtype}, expected ({expected}) {dtype.__name__}"
        )
