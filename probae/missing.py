"""Values missing at random, in programs of one's own."""

from probae.tracing.missing import masked, observed

__all__ = ["masked", "observed"]
