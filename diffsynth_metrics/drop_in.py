"""For code written for ``diffsynth.metrics``: the names, orders and neutral values that it passes.

There a metric is a ``torch.nn.Module`` whose ``from_pretrained`` takes all arguments by position. What
such code passes and what changes nothing here is accepted; a value that would change the result and is
not supported is an error that says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import Self

if TYPE_CHECKING:
    from torch import nn

__all__ = ["DropIn", "name_arguments", "take_neutral"]

_OTHER_NAMES = {"tokenizer_config": "processor_config", "tokenizer_kwargs": "processor_kwargs"}


def name_arguments(
    order: Sequence[str], more: Sequence[Any], options: Mapping[str, Any], *, owner: str
) -> dict[str, Any]:
    """Return options by name, those that were passed by position included.

    Args:
        order: The names of the positions that follow the named ones.
        more: What was passed there.
        options: What was passed by name.
        owner: Whose arguments they are, for messages.

    Raises:
        TypeError: There are more arguments than positions, or one was passed twice.
    """
    if len(more) > len(order):
        raise TypeError(
            f"{owner}.from_pretrained takes {', '.join(order)} behind device by position, and got "
            f"{len(more)} values there"
        )
    named = dict(zip(order, more, strict=False))
    for name, value in options.items():
        own = _OTHER_NAMES.get(name, name)
        if own in named:
            raise TypeError(f"{owner}.from_pretrained got {own} twice")
        named[own] = value
    return named


def take_neutral(options: dict[str, Any], neutral: Mapping[str, Any], *, owner: str) -> None:
    """Remove the options that have no meaning here, if they have the value that changes nothing.

    Raises:
        ValueError: One has another value.
    """
    for name, value in neutral.items():
        if options.pop(name, value) != value:
            raise ValueError(
                f"{owner} does not support another {name} than {value!r}; leave it out"
                + ("" if name != "vram_limit" else ", and choose device or torch_dtype instead")
            )


class DropIn:
    """The methods of a ``torch.nn.Module`` that users call on a metric of ``diffsynth.metrics``."""

    if TYPE_CHECKING:
        model: nn.Module

        def compute(self, *inputs: Any, **options: Any) -> Any:
            """See the metric."""

        def to(self, device: Any = None, dtype: Any = None, non_blocking: bool = False) -> Self:
            """See :class:`~diffsynth_metrics.base.BaseMetric`."""

    def score(self, *inputs: Any, **options: Any) -> Any:
        """Do the same as ``compute``; the name that ``diffsynth.metrics`` uses."""
        return self.compute(*inputs, **options)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Do the same as ``compute``, as a Module's ``forward`` in ``diffsynth.metrics`` does."""
        return self.compute(*inputs, **options)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """Do the same as ``compute``."""
        return self.compute(*inputs, **options)

    def eval(self) -> Self:
        """Return the metric: its network is in evaluation mode from the beginning."""
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Accept False: the weights of a metric never receive a gradient.

        Raises:
            ValueError: `requires_grad` is True.
        """
        if requires_grad:
            raise ValueError(
                "a metric's weights receive no gradients; to train the network, call "
                "metric.model.requires_grad_() and use metric.model"
            )
        return self

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Return the weights of the network."""
        return self.model.parameters()

    def cpu(self) -> Self:
        """Move the network to the CPU and return the metric."""
        return self.to("cpu")

    def cuda(self, device: int | str | torch.device | None = None) -> Self:
        """Move the network to a CUDA device, the current one by default, and return the metric."""
        if device is None:
            return self.to("cuda")
        return self.to(torch.device("cuda", device) if isinstance(device, int) else device)

    def half(self) -> Self:
        """Bring the towers to float16, as ``.to(dtype=torch.float16)``, and return the metric."""
        return self.to(dtype=torch.float16)

    def bfloat16(self) -> Self:
        """Bring the towers to bfloat16, as ``.to(dtype=torch.bfloat16)``, and return the metric."""
        return self.to(dtype=torch.bfloat16)

    def float(self) -> Self:
        """Bring the towers to float32, as ``.to(dtype=torch.float32)``, and return the metric."""
        return self.to(dtype=torch.float32)
