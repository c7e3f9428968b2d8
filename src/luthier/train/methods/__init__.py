"""The training methods: each in a module of its own, behind one protocol."""

from luthier.train.methods.encoding import encoders
from luthier.train.methods.method import Ingredients, Method, load

__all__ = ["Ingredients", "Method", "encoders", "load"]
