"""Models that write completions: local models, small/large pairs, scripted models and remote APIs."""
