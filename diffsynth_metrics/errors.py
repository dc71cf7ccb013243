"""The exceptions that are the package's own.

DiffSynthMetricsError
├── AnswerError (ValueError)       a judge's answer cannot be read
├── CheckpointError (ValueError)   a weight file is truncated, incomplete or belongs elsewhere
├── DownloadError (OSError)        files could not be had
├── ImageError (ValueError)        an image cannot be read, or is not what a metric accepts
├── RewardError (RuntimeError)     a sample has no reward, and the caller did not say what it gets then
└── ServerError (OSError)          a server is not reached, or refuses what it is asked

Where Python has the word (TypeError, ValueError, FileNotFoundError), that is raised instead.
"""

__all__ = [
    "AnswerError",
    "CheckpointError",
    "DiffSynthMetricsError",
    "DownloadError",
    "ImageError",
    "RewardError",
    "ServerError",
]


class DiffSynthMetricsError(Exception):
    """Base of the package's own exceptions."""


class CheckpointError(DiffSynthMetricsError, ValueError):
    """A weight file is truncated, incomplete or belongs to another metric."""


class DownloadError(DiffSynthMetricsError, OSError):
    """Files could not be downloaded, or may not be."""


class ImageError(DiffSynthMetricsError, ValueError):
    """An image cannot be read, or is not what a metric accepts."""


class AnswerError(DiffSynthMetricsError, ValueError):
    """A judge's answer cannot be read, and the caller asked for an error.

    Attributes:
        text: What the judge wrote.
    """

    def __init__(self, message: str, text: str = "") -> None:
        """Keep the judge's text next to the message."""
        super().__init__(message)
        self.text = text


class RewardError(DiffSynthMetricsError, RuntimeError):
    """A sample has no reward, and the caller did not say what it gets then."""


class ServerError(DiffSynthMetricsError, OSError):
    """A server is not reached, or refuses what it is asked."""
