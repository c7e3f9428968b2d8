"""Many runs of one recipe: what is varied, the processes that train, and the answer of it all."""
