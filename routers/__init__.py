"""Pure decisions: which pair answers a query (`query`), which model writes a token (`token`)."""
