"""What luthier adds to every TRL and transformers trainer."""
