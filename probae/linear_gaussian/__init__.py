"""Solvers of the linear-Gaussian models: maximum likelihood in closed form or by quasi-Newton steps, EM with gaps, rotation."""
