"""`viaticum demo` from a program: 24 questions in three lanes, one budget, a job that is killed and goes on.

Takes the options of the command, such as a file of questions of your own.
"""

from __future__ import annotations

import sys

from viaticum.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "demo")
    main()
