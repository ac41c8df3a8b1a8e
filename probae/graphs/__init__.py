"""Pyro computations traced once into flat graphs of tensor operations: interpreted, compiled, or captured on a GPU.

**What a trace takes for granted.** A program is a pure function of its inputs and of the tensors that it reads:

* tensors, parameters and buffers are *read anew* at each run, and what the program writes to parameters and buffers in
  place is written at each run;
* numbers, strings, flags, Python's containers and functions are *constants* of the trace.

What changes between runs is noticed, and the program traced anew: the constants that the program reaches are compared with
those of the trace at the records of a training run, after its callbacks, and whenever evidence is asked for. These are the
attributes of model and objective and of their submodules, what functions close over, the globals that they name, and which
parameters are frozen; of an optimizer whose update is in the graph, its settings. The learning rate is read at each step.
What a data set or a scheduler changes between two records is not noticed before the next one.

A program that changes a constant while it runs, or draws from another random stream than torch's, is refused: it is run
as it is, with a warning that names what it changes. This shows in a run before the trace; and what does not (an iterator, or
state of a library's), when the graph's results are compared, once, with those of that run. A program that turns the value
of a tensor into a number or a branch is refused too.
"""

from probae.graphs.graph import Graph, Untraceable, fall_back, trace
from probae.graphs.runner import Runner

__all__ = ["Graph", "Runner", "Untraceable", "fall_back", "trace"]
