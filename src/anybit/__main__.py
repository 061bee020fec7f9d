"""`python -m anybit`."""

from anybit.cli import main

main()
