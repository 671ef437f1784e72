"""Routing decisions without side effects: the pair for a query (`query`), the model for a token (`token`)."""
