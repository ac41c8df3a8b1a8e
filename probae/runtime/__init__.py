"""What surrounds a computation: seeds, threads, processes, precision."""
