"""Training for token-level decoding: labels, calibration and R-Stitch+'s policy."""
