"""The training methods: each in a module of its own, behind one protocol."""

from luthier.train.methods.base import Method, TrainerInputs, load
from luthier.train.methods.encoders import encoders

__all__ = ["Method", "TrainerInputs", "encoders", "load"]
