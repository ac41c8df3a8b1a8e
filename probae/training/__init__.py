"""How a pair is trained: data, the loop, what is watched."""

from probae.training.loop import Run, fit

__all__ = ["Run", "fit"]
