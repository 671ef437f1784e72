"""Read the final answer out of text, and compare answers.

Answers are strings in a canonical form. Units, currency signs and the percent sign are ignored ("$5", "5
dollars" and "5" are equal, as are "50%" and "50"), and so are thousands separators, trailing zeros, simple
fractions and powers of ten ("1,200.00" is "1200", "3/4" is "0.75", "3 x 10^8" is "300000000"). `dates`
handles dates; `expressions` compares expressions by math-verify if the extra `math` is installed, otherwise
as text.

Every pattern runs in linear time, every text is truncated before it is searched, and symbolic comparison has
a time limit (`expressions.SECONDS`), so that nothing a model writes can raise an error or hang here.
"""

from viaticum.strategies.answers.comparing import agreement, equivalent, group, is_right, normalise
from viaticum.strategies.answers.numbers import find_number, whole_number, write_number
from viaticum.strategies.answers.reading import Candidate, Explanation, explain, read_answer

__all__ = [
    "Candidate",
    "Explanation",
    "agreement",
    "equivalent",
    "explain",
    "find_number",
    "group",
    "is_right",
    "normalise",
    "read_answer",
    "whole_number",
    "write_number",
]
