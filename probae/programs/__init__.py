"""Users' programs as a pair: their parameters, what they reach, and passes through them."""
