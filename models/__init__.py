"""Models that write completions: local ones, small/large pairs, scripted ones, and models behind an API."""
