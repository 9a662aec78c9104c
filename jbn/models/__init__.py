"""Models, written once in Linen, with the norm as an argument."""

from jbn.models.mlp import MLP as MLP
