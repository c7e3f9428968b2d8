"""The training methods: each in a module of its own, behind one protocol."""

from luthier.train.methods.encoders import make_row_encoders
from luthier.train.methods.method import TrainerInputs, TrainingMethod, load_method

__all__ = ["TrainerInputs", "TrainingMethod", "load_method", "make_row_encoders"]
