"""Where data come from, minibatch by minibatch: memory, a sparse matrix, a mapped file, a Dataset or a DataLoader."""

from probae.data.streams.densified import blocks_of
from probae.data.streams.loader import fetching
from probae.data.streams.minibatches import InMemory, Minibatch, Source
from probae.data.streams.sources import source, streams_from_disk

__all__ = ["InMemory", "Minibatch", "Source", "blocks_of", "fetching", "source", "streams_from_disk"]
