"""From a model's name to a tokenizer, weights, quantization and adapters on this machine."""
