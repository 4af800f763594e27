"""The batches of a training run.

A batch is a function of (seed, step): each pass over the pairs has a seeded order, and a rank
takes its slice of every batch. So a run that goes on after a kill sees what it would have seen,
and the number of ranks does not change the batches.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from encoders.augment import augment_photo
from encoders.checkpoint import Tokenizers
from encoders.train import TrainBatch
from jobs.config import TrainConfig
from jobs.errors import JobError
from jobs.pair_data import Int64Array, Pair, PairData

MOST_BAD_IN_A_ROW = 100
MODALITY_DROPOUT = 0.1  # share of MSR products whose image, or else text, is left out: ours


def check_batch_size(data: PairData, config: TrainConfig, ranks: int) -> None:
    """Refuse a batch that the pairs can't fill, or that can't be shared out.

    Raises:
        JobError: It is so.
    """
    if len(data) < config.batch_size:
        raise JobError(
            f"train.pairs has {len(data)} pairs, fewer than train.batch_size {config.batch_size}"
        )
    if config.batch_size % (ranks * config.accumulate):
        raise JobError(
            f"train.batch_size {config.batch_size} does not divide by {ranks} workers "
            f"x train.accumulate {config.accumulate}"
        )


class Batches:
    """A rank's share of every batch, by the number of the step."""

    def __init__(
        self,
        data: PairData,
        tokenizers: Tokenizers,
        config: TrainConfig,
        *,
        rank: int = 0,
        ranks: int = 1,
        threads: int = 2,
    ) -> None:
        """Bind pairs to a configuration.

        Raises:
            JobError: There are fewer pairs than a batch has, or it does not divide by the ranks.
        """
        check_batch_size(data, config, ranks)
        self._data, self._tokenizers, self._config = data, tokenizers, config
        self._rank, self._share, self._threads = rank, config.batch_size // ranks, threads
        self._order: tuple[int, Int64Array] = (-1, np.zeros(0, np.int64))
        self.negatives: Int64Array | None = None

    def load(self, step: int) -> TrainBatch:
        """Make the batch of a step, from 1.

        Raises:
            JobError: Too many pairs in a row can't be used.
        """
        first = self._rank * self._share
        places = range(first, first + self._share)
        per_pass = len(self._data) // self._config.batch_size
        number, within = divmod(step - 1, per_pass)
        order, start = self._permutation(number), within * self._config.batch_size
        seeds = [(self._config.seed, step, place) for place in places]
        with ThreadPoolExecutor(self._threads) as pool:
            pairs = list(pool.map(lambda place: self._next_usable(order, start + place), places))
            if self._data.is_msr:
                return self._msr_batch(pairs, seeds, pool)
            return self._mim_batch(pairs, seeds, pool)

    def _next_usable(self, order: Int64Array, start: int) -> Pair:
        """Load the pair at a place of a pass; the next one that is usable, if it is not."""
        most = min(MOST_BAD_IN_A_ROW, len(order))
        for skipped in range(most):
            row = int(order[(start + skipped) % len(order)])
            pair = self._data.load(row, photo=self._config.augment)
            if pair is not None:
                return pair
        why = self._data.explain_bad()
        raise JobError(f"train.pairs: {most} pairs in a row can't be used: {why}")

    def _permutation(self, number: int) -> Int64Array:
        if self._order[0] != number:
            random = np.random.default_rng((self._config.seed, number))
            self._order = (number, random.permutation(len(self._data)))
        return self._order[1]

    def _mim_batch(
        self, pairs: list[Pair], seeds: list[tuple[int, int, int]], pool: ThreadPoolExecutor
    ) -> TrainBatch:
        data, rows = self._data, [pair.row for pair in pairs]
        photos = [pair.photo for pair in pairs if pair.photo is not None]
        if self._config.augment:
            side = data.preprocess.size_px
            draws = [np.random.default_rng(seed) for seed in seeds]
            photos = list(pool.map(augment_photo, photos, [side] * len(photos), draws))
        products = [pair.picture for pair in pairs if pair.picture is not None]
        words = {role: data.texts(role, rows) for role in ("query", "product")}
        inputs = {
            "query_pixels": torch.from_numpy(np.stack(photos)),
            "product_pixels": torch.from_numpy(np.stack(products)),
            "query_tokens": torch.from_numpy(self._tokenizers.query(words["query"])),
            "product_tokens": torch.from_numpy(self._tokenizers.product(words["product"])),
        }
        labels = self._labels(rows) | {
            f"has_{role}_text": torch.tensor([bool(t) for t in words[role]]) for role in words
        }
        return TrainBatch(inputs=inputs, labels=labels)

    def _msr_batch(
        self, pairs: list[Pair], seeds: list[tuple[int, int, int]], pool: ThreadPoolExecutor
    ) -> TrainBatch:
        data, side = self._data, self._data.preprocess.size_px
        rows = [pair.row for pair in pairs]
        wrong: list[int] = []
        if self.negatives is not None:
            wrong = self.negatives[rows].reshape(-1).tolist()
        more = pool.map(lambda row: data.picture("product", row), wrong)
        pictures = [*(pair.picture for pair in pairs), *more]
        texts = data.texts("product", [*rows, *wrong])
        has_image = np.array([picture is not None for picture in pictures])
        has_text = np.array([bool(text) for text in texts])
        for place, seed in enumerate(seeds):
            if has_image[place] and has_text[place]:  # never both
                image, text = np.random.default_rng(seed).random(2)
                has_image[place] = image >= MODALITY_DROPOUT
                has_text[place] = not has_image[place] or text >= MODALITY_DROPOUT
        blank = np.zeros((side, side, 3), np.uint8)
        words = data.texts("query", rows)
        inputs = {
            "query_tokens": torch.from_numpy(self._tokenizers.query(words)),
            "product_tokens": torch.from_numpy(self._tokenizers.product(texts)),
            "product_pixels": torch.from_numpy(
                np.stack([blank if picture is None else picture for picture in pictures])
            ),
            "has_product_image": torch.from_numpy(has_image),
            "has_product_text": torch.from_numpy(has_text),
        }
        labels = self._labels(rows)
        labels["negative_ids"] = torch.from_numpy(data.product_ids[np.array(wrong, np.int64)])
        return TrainBatch(inputs=inputs, labels=labels)

    def _labels(self, rows: list[int]) -> dict[str, torch.Tensor]:
        return {
            "product_ids": torch.from_numpy(self._data.product_ids[rows]),
            "query_ids": torch.from_numpy(self._data.query_ids[rows]),
            "right_ids": torch.from_numpy(self._data.right_ids(rows)),
        }
