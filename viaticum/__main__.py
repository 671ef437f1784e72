"""`python -m viaticum`, for where the command is not on the path."""

from viaticum.cli import main

main()
