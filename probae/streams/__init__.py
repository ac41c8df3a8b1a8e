"""Where data come from, minibatch by minibatch: memory, a mapped file, a Dataset or a DataLoader."""

from probae.streams.loader import fetching
from probae.streams.minibatches import InMemory, Minibatch, Source
from probae.streams.sources import source, streams_from_disk

__all__ = ["InMemory", "Minibatch", "Source", "fetching", "source", "streams_from_disk"]
