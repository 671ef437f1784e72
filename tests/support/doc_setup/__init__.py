"""What some pages of the documentation take as given, a module a page: its names are the page's.

A page shows `solve(questions)` and leaves out where questions come from; the module of its name has them.
"""
