"""Every command of luthier: the only place that parses arguments and prints help."""
