"""The `viaticum` command, and `python -m viaticum`. Loads nothing itself, so that Ctrl-C is heard at once."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Load the command line and run it (`viaticum.cli.main`)."""
    try:
        from viaticum.cli import main as command
    except KeyboardInterrupt:
        sys.exit(130)
    try:
        command()
    finally:  # nothing is left but Python's own end, which would tell of an interrupt as of a fault
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    main()
