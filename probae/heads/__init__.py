"""What models are made of: likelihoods, priors, posteriors, networks and the distributions behind them."""
