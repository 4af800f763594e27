"""Times and shows the steps of a stage that tells its steps in words alone."""

import re
import time

from jobs.progress import Progress

STEPS = ("exact search", "sample", "train", "add and merge", "update", "measure")
HOW_FAR = re.compile(r"(.+), (\d+) of (\d+)")


def show_words(progress: Progress, words: str) -> None:
    """Show what a task tells: how far its step is where that is what they say, else a step."""
    if far := HOW_FAR.fullmatch(words):
        progress.far(far[1], int(far[2]), int(far[3]))
    else:
        progress.step(words)


class StepClock:
    """Times the steps of building one index, by what `jobs.index.build_index` tells.

    Attributes:
        seconds: Of each step so far, by its first words; a step that comes twice is summed.
    """

    def __init__(self, field: str, progress: Progress) -> None:
        """Wait for the first step.

        Args:
            field: Whose index is built; a step is told as `field: step`.
            progress: Shows the words, and how far a step is where they say it.
        """
        self.seconds: dict[str, float] = {}
        self._field, self._progress = field, progress
        self._step, self._began = "", time.monotonic()

    def begin(self, words: str) -> None:
        """Take words; those that name no step, as how far one is, belong to the one under way."""
        told = words.removeprefix(f"{self._field}: ")
        step = next((name for name in STEPS if told.startswith(name)), self._step)
        if step != self._step:
            self.end()
            self._step = step
        show_words(self._progress, words)

    def end(self) -> None:
        """End the step under way."""
        now = time.monotonic()
        if self._step:
            self.seconds[self._step] = self.seconds.get(self._step, 0.0) + now - self._began
        self._step, self._began = "", now
