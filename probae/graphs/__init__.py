"""Pyro computations traced once into flat graphs of tensor operations: interpreted, compiled, or captured on a GPU.

**What a trace takes for granted.** A program is a pure function of its inputs and of the tensors that it reads:

* tensors, parameters and buffers are *read anew* at each run, and what the program writes to parameters and buffers in
  place is written at each run;
* numbers, strings, flags, Python's containers and functions are *constants* of the trace.

What changes between runs is noticed, and the program traced anew: once at each record of a training run, after callbacks,
and at each call that asks for evidence, the constants that the program reaches are compared with those of the trace
(attributes of model and objective and of their submodules, the optimizer's settings, frozen parameters, what functions
close over, and globals that they name). The learning rate is read at each step.

A program that changes such a constant while it runs is refused: it is run as it is, with a warning that names what it
changes. This is seen as the program runs before its trace, and once more as the graph's results are compared with that
run's. What neither shows (state behind a library's objects that shows only later) is not noticed.
"""

from probae.graphs.graph import Graph, Untraceable, fall_back, trace
from probae.graphs.runner import Runner

__all__ = ["Graph", "Runner", "Untraceable", "fall_back", "trace"]
