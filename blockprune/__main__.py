"""`python -m blockprune`."""

from blockprune.cli import main

main()
