"""Data on their way to a model: batches, missing values, streams of minibatches, named data sets and files."""
