"""Reports on runs: what a job got for its money, as one HTML file, Markdown, JSON or a picture.

Reads jobs, ledgers and outcome tables; changes none of them. `build` writes a report; `read_numbers` gives
its numbers alone.
"""

from viaticum.reports.build import FORMATS, Report, build
from viaticum.reports.numbers import Numbers, read_numbers

__all__ = ["FORMATS", "Numbers", "Report", "build", "read_numbers"]
