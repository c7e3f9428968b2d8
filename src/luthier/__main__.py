"""`python -m luthier`: the same as the `luthier` command."""

from luthier.cli.main import main

main()
