"""One file per metric: its card, how it is loaded, its formula.

The public names of :mod:`diffsynth_metrics` can be imported from here as well, so that an import from
``diffsynth.metrics`` needs only the package's name replaced. Each is imported on first use, because one
metric should not pay for the libraries of the others.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffsynth_metrics import *  # noqa: F403
else:
    from diffsynth_metrics import __all__, __dir__, __getattr__  # noqa: F401
