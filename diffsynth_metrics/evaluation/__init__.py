"""From folders of pictures to a verdict: read samples, score them, compare runs, report, look.

    from diffsynth_metrics.evaluation import compare, read_samples, report, score
    before = score(read_samples("before/"), ["pickscore"], out="runs/before")
    after = score(read_samples("after/"), ["pickscore"], out="runs/after")
    comparison = compare(before, after)
    print(comparison)
    report(comparison, "report.html")

It stands on the public contract of metrics alone, and needs ``pip install "diffsynth-metrics[eval]"``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffsynth_metrics.evaluation.checking import check
    from diffsynth_metrics.evaluation.comparison import Comparison, compare
    from diffsynth_metrics.evaluation.contact_sheet import show
    from diffsynth_metrics.evaluation.html_report import report
    from diffsynth_metrics.evaluation.results import Results
    from diffsynth_metrics.evaluation.samples import Sample, SampleSet, read_samples
    from diffsynth_metrics.evaluation.scoring import score
    from diffsynth_metrics.evaluation.tables import Table

_HOME = {
    "Comparison": "comparison",
    "Results": "results",
    "Sample": "samples",
    "SampleSet": "samples",
    "Table": "tables",
    "check": "checking",
    "compare": "comparison",
    "read_samples": "samples",
    "report": "html_report",
    "score": "scoring",
    "show": "contact_sheet",
}

__all__ = [
    "Comparison",
    "Results",
    "Sample",
    "SampleSet",
    "Table",
    "check",
    "compare",
    "read_samples",
    "report",
    "score",
    "show",
]


def __dir__() -> list[str]:
    return __all__


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Import a public name from the module that defines it, and keep it."""
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
