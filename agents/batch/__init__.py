"""`viaticum batch`: many questions under one budget and deadline, resumable."""
