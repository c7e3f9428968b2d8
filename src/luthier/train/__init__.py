"""From a valid config to a trained model: the order of a run, one trainer per method.

The package can be called: `luthier.train("quickstart", "lora.r=8")` is `luthier.notebook.train`.
"""

import sys

from luthier import CallablePackage

# Python has no other way for a package and a function of one name.
sys.modules[__name__].__class__ = CallablePackage
