"""The training methods: each in a module of its own, behind one protocol."""

from luthier.train.methods.base import Ingredients, Method, load
from luthier.train.methods.encoders import encoders

__all__ = ["Ingredients", "Method", "encoders", "load"]
