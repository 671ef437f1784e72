"""Programs that models write: find the program in a reply, make it end in its answer, read what it printed.

Running it is the sandbox's part (`strategies.sandbox`). Every text is bounded before it is parsed, programs
are only parsed here, never run, and nothing that a model wrote raises an error.
"""

from viaticum.strategies.programs.ending import end_in_answer
from viaticum.strategies.programs.finding import find_program
from viaticum.strategies.programs.output import read_output

__all__ = ["end_in_answer", "find_program", "read_output"]
