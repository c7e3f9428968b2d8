"""From a valid config to a trained model: the order of a run, one trainer per method."""
