"""Every error a user can cause or meet, in one tree.

JobError                    exit 1, one line: what was found, what was expected, what to do
├── ConfigError             the configuration: an unknown key, a wrong value
├── CatalogError            the catalog: all its faults at once, each with its file
├── StoreError              what lies in the store can't be used
│   ├── FingerprintError    it was made by another encoder
│   └── PublishConflictError  another job published first
└── GateError               measured quality is under the bar; nothing was published

The cores (`encoders`, `indexing`) raise ValueError; the stages turn it into one of these.
"""

from collections.abc import Sequence


class JobError(Exception):
    """An expected failure, told in one line."""


class ConfigError(JobError):
    """The configuration can't be used."""


class CatalogError(JobError):
    """The catalog can't be read as the configuration says."""

    def __init__(self, faults: str | Sequence[str]) -> None:
        """Join all faults into one message.

        Args:
            faults: One fault or several; each is a whole sentence.
        """
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        super().__init__("; ".join(self.faults))


class StoreError(JobError):
    """Something in the store is missing, damaged or of another version."""


class FingerprintError(StoreError):
    """An artifact belongs to another encoder than the one in use."""


class PublishConflictError(StoreError):
    """Another job published a release since this one began."""


class GateError(JobError):
    """A release's measured quality is under the bar.

    Attributes:
        report: Path of the report that shows the figures.
    """

    def __init__(self, failures: Sequence[str], report: str) -> None:
        """Join the failed bars into one message.

        Args:
            failures: Each bar that was missed, with the figure and the bar.
            report: Path of the report.
        """
        self.failures = list(failures)
        self.report = report
        super().__init__(f"nothing published: {'; '.join(failures)} (report: {report})")
