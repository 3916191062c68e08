"""`python -m gdjax.commands`."""

from gdjax.commands import main

main()
