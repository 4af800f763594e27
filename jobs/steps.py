"""Times the steps of a stage that tells its steps in words alone."""

import time
from collections.abc import Callable

STEPS = ("exact search", "sample", "train", "add and merge", "update", "measure")


class StepClock:
    """Times the steps of building one index, by what `jobs.index.build_index` tells.

    Attributes:
        seconds: Of each step so far, by its first words; a step that comes twice is summed.
    """

    def __init__(self, field: str, tell: Callable[[str], None]) -> None:
        """Wait for the first step.

        Args:
            field: Whose index is built; a step is told as `field: step`.
            tell: What else takes the words.
        """
        self.seconds: dict[str, float] = {}
        self._field, self._tell = field, tell
        self._step, self._began = "", time.monotonic()

    def begin(self, words: str) -> None:
        """Take words; those that name no step, as how far one is, belong to the one under way."""
        told = words.removeprefix(f"{self._field}: ")
        step = next((name for name in STEPS if told.startswith(name)), self._step)
        if step != self._step:
            self.end()
            self._step = step
        self._tell(words)

    def end(self) -> None:
        """End the step under way."""
        now = time.monotonic()
        if self._step:
            self.seconds[self._step] = self.seconds.get(self._step, 0.0) + now - self._began
        self._step, self._began = "", now
