"""Solvers for models with discrete latents: EM with restarts, weighted maximum likelihood, chains."""
