"""Byte-identical images are embedded once a run, and their vector is fanned out to all of them.

One actor a run keeps the vectors of the images that were met last, by a hash of their bytes, and
knows which batch embeds an image just now. It is a saving, never a need: where it is gone, has
forgotten an image, or a batch that claimed one does not answer, the image is embedded again. Its
memory is bounded: some 2 * D + 200 bytes a kept image. A new run starts with none.

Letters: B rows of a batch, U images that differ, D dimension.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from ray.exceptions import GetTimeoutError, RayActorError

from jobs.nodes import on_workers

BoolArray = npt.NDArray[np.bool_]
Float16Array = npt.NDArray[np.float16]
Int64Array = npt.NDArray[np.int64]

CLAIM_S = 60.0
"""Seconds after which nobody waits for the batch that claimed an image: its actor was killed."""
ANSWER_S = 60.0
MAX_CALLS = 10_000  # waiting calls count, and must not keep out the answer that they wait for

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is known of U images.

    Attributes:
        vectors: (U, D) float16 as they are stored; NaN where not known, or where the encoder
            gave none.
        known: (U,) bool: the vector is the one to use.
        mine: (U,) bool: whoever asked is to embed and publish it.
    """

    vectors: Float16Array
    known: BoolArray
    mine: BoolArray


def know_nothing(count: int, dim: int, *, mine: bool = False) -> Answer:
    """Return an answer in which no image is known.

    Args:
        count: U.
        dim: D.
        mine: Whether all are to be embedded by whoever asked.
    """
    return Answer(
        vectors=np.full((count, dim), np.nan, np.float16),
        known=np.zeros(count, bool),
        mine=np.full(count, mine),
    )


@dataclass
class _Claim:
    """An image that a batch embeds just now."""

    batch: int
    since: float
    vector: asyncio.Future[Float16Array] = field(repr=False)


class ImageVectors:
    """The vectors of the images that were met last, and who embeds an image just now.

    Every call may be repeated: Ray does, after it started a lost actor again, empty.
    """

    def __init__(self, rows: int, dim: int, claim_s: float) -> None:
        """Start with none.

        Args:
            rows: The most vectors that are kept; the one that was not asked for longest goes.
            dim: D.
            claim_s: Seconds for which a claim holds.
        """
        self._rows, self._dim, self._claim_s = rows, dim, claim_s
        self._vectors: OrderedDict[int, Float16Array] = OrderedDict()
        self._claims: dict[int, _Claim] = {}

    async def lookup(self, contents: Int64Array) -> Answer:
        """Return what is known of images; (U,) int64 hashes."""
        answer = know_nothing(len(contents), self._dim)
        for place, content in enumerate(contents.tolist()):
            vector = self._vectors.get(content)
            if vector is not None:
                self._vectors.move_to_end(content)
                answer.vectors[place], answer.known[place] = vector, True
        return answer

    async def claim(self, contents: Int64Array, batch: int) -> Answer:
        """Return what is known, and claim what nobody else embeds just now.

        Args:
            contents: (U,) int64 hashes.
            batch: Names who asks; a batch that is run again after a fault gets its own claims.
        """
        answer, now = await self.lookup(contents), time.monotonic()
        for place in np.flatnonzero(~answer.known).tolist():
            content = int(contents[place])
            claim = self._claims.get(content)
            if claim is None:
                future = asyncio.get_running_loop().create_future()
                self._claims[content] = _Claim(batch, now, future)
            elif claim.batch == batch or now - claim.since >= self._claim_s:
                claim.batch, claim.since = batch, now
            answer.mine[place] = claim is None or claim.batch == batch
        return answer

    async def publish(self, contents: Int64Array, vectors: Float16Array) -> None:
        """Keep the vectors (U, D) of images, and hand them to all who wait for them."""
        for content, row in zip(contents.tolist(), vectors, strict=True):
            vector = row.copy()  # a view would keep the whole message
            self._vectors[content] = vector
            self._vectors.move_to_end(content)
            claim = self._claims.pop(content, None)
            if claim is not None:
                claim.vector.set_result(vector)
        while len(self._vectors) > self._rows:
            self._vectors.popitem(last=False)

    async def wait(self, contents: Int64Array) -> Answer:
        """Wait for images that others have claimed; what is not known then never will be."""
        claims = {content: self._claims.get(content) for content in contents.tolist()}
        waiting = {claim.vector for claim in claims.values() if claim is not None}
        if waiting:
            await asyncio.wait(waiting, timeout=self._claim_s)
        answer = await self.lookup(contents)
        for place, claim in enumerate(claims.values()):
            if claim is not None and claim.vector.done():  # it may be forgotten again by now
                answer.vectors[place], answer.known[place] = claim.vector.result(), True
        return answer


@contextmanager
def image_vectors(rows: int, dim: int, *, claim_s: float = CLAIM_S) -> Iterator[Any]:
    """Start the actor of one run; give its handle, or None where nothing is to be kept.

    Args:
        rows: The most vectors that it keeps; 0: equal images are found within a batch alone.
        dim: D of a stored image vector.
        claim_s: Seconds after which nobody waits for the batch that claimed an image.
    """
    if rows == 0:
        yield None
        return
    actor = ray.remote(ImageVectors).options(
        num_cpus=0,
        label_selector=on_workers(),
        max_concurrency=MAX_CALLS,
        max_restarts=-1,
        max_task_retries=-1,
    )
    handle = actor.remote(rows, dim, claim_s)
    yield handle
    ray.kill(handle)  # after a fault Ray itself ends it: the cluster may be gone


class SharedVectors:
    """Asks the run's `ImageVectors`, and goes on without it once it is gone."""

    def __init__(self, actor: Any | None, dim: int) -> None:  # noqa: ANN401
        """Ask nothing yet.

        Args:
            actor: The handle, or None: nothing is known, and all is to be embedded.
            dim: D.
        """
        self._actor, self._dim = actor, dim

    def lookup(self, contents: Int64Array) -> Answer:
        """Return what is known of the images of (U,) int64 hashes."""
        return self._ask("lookup", contents) or know_nothing(len(contents), self._dim)

    def claim(self, contents: Int64Array, batch: int) -> Answer:
        """Claim images (U,) int64 for a batch; see `ImageVectors.claim`."""
        nothing = know_nothing(len(contents), self._dim, mine=True)
        return self._ask("claim", contents, batch) or nothing

    def publish(self, contents: Int64Array, vectors: Float16Array) -> None:
        """Publish the vectors (U, D) of images; see `ImageVectors.publish`."""
        self._ask("publish", contents, vectors)

    def wait(self, contents: Int64Array) -> Answer:
        """Wait for the images (U,) int64 of other batches; see `ImageVectors.wait`."""
        return self._ask("wait", contents) or know_nothing(len(contents), self._dim)

    def _ask(self, method: str, contents: Int64Array, *args: Any) -> Any:  # noqa: ANN401
        if self._actor is None or len(contents) == 0:
            return None
        patience_s = ANSWER_S + (CLAIM_S if method == "wait" else 0.0)
        try:
            call = getattr(self._actor, method).remote(contents, *args)
            return ray.get(call, timeout=patience_s)
        except (RayActorError, GetTimeoutError) as error:
            _log.warning("equal images are found within a batch alone from here on: %s", error)
            self._actor = None
            return None


class BatchImages:
    """The images of one batch on the way to their vectors; equal ones take it together.

    Attributes:
        embedded: (B,) bool: whose own pixels went through the encoder.
    """

    def __init__(
        self,
        shared: SharedVectors,
        contents: Int64Array,
        riding: tuple[BoolArray, Float16Array],
        encode: Callable[[Int64Array], npt.NDArray[np.float32]],
    ) -> None:
        """Group a batch by content.

        Args:
            shared: What other batches know.
            contents: (B,) int64 hashes of the images' bytes.
            riding: (B,) bool which vectors are known, and (B, D) float16 these.
            encode: Embeds the images of rows (U,) int64 of the batch: (U, D) float32.
        """
        known, vectors = riding
        self._shared, self._encode = shared, encode
        self._contents, self._first, self._group = np.unique(
            contents, return_index=True, return_inverse=True
        )
        self._vectors = np.full((len(self._contents), vectors.shape[1]), np.nan, np.float16)
        self._vectors[self._group[known]] = vectors[known]
        self._open = np.ones(len(self._contents), bool)
        self._open[self._group[known]] = False
        self.embedded = np.zeros(len(contents), bool)

    def embed_claimed(self, batch: int) -> None:
        """Embed and publish what no other batch embeds.

        First for all batches, and only then the waiting: so no two wait for each other.

        Args:
            batch: Names the batch; the same when it is run again.
        """
        asked = np.flatnonzero(self._open)
        answer = self._shared.claim(self._contents[asked], batch)
        self._take(asked, answer)
        self._embed(asked[answer.mine])

    def await_others(self) -> None:
        """Take what other batches have claimed; embed what does not come."""
        asked = np.flatnonzero(self._open)
        self._take(asked, self._shared.wait(self._contents[asked]))
        self._embed(np.flatnonzero(self._open))

    @property
    def vectors(self) -> Float16Array:
        """(B, D) float16, the same for equal images; NaN where the encoder gave none."""
        return np.asarray(self._vectors[self._group])

    def _take(self, asked: Int64Array, answer: Answer) -> None:
        self._vectors[asked[answer.known]] = answer.vectors[answer.known]
        self._open[asked[answer.known]] = False

    def _embed(self, groups: Int64Array) -> None:
        if len(groups):
            places = self._first[groups]
            self._vectors[groups] = self._encode(places).astype(np.float16)
            self._open[groups], self.embedded[places] = False, True
            self._shared.publish(self._contents[groups], self._vectors[groups])
