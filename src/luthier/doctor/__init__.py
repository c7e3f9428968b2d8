"""What a machine has for training, and whether each way of training computes what it should."""
