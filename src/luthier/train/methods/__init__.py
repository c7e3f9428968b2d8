"""The training methods: each in a module of its own, behind one protocol."""

from luthier.train.methods.method import Ingredients, Method, encoders, load

__all__ = ["Ingredients", "Method", "encoders", "load"]
