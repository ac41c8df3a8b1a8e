"""What is a model: one file per generative story, and the catalogue of them all."""

from probae.models.autoencoder import Autoencoder, StochasticAutoencoder
from probae.models.baselines import GaussianMixture, Independent
from probae.models.catalogue import CATALOGUE, Model, make, names, register
from probae.models.generative_stochastic_network import GenerativeStochasticNetwork
from probae.models.linear_gaussian import PPCA, FactorAnalysis
from probae.models.sparse_autoencoder import SparseAutoencoder
from probae.models.sparse_coding import SparseCoding
from probae.models.spike_and_slab import SpikeAndSlab
from probae.models.vae import VAE

__all__ = [
    "CATALOGUE",
    "PPCA",
    "VAE",
    "Autoencoder",
    "FactorAnalysis",
    "GaussianMixture",
    "GenerativeStochasticNetwork",
    "Independent",
    "Model",
    "SparseAutoencoder",
    "SparseCoding",
    "SpikeAndSlab",
    "StochasticAutoencoder",
    "make",
    "names",
    "register",
]
