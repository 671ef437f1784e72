"""Token-level training: labels for R2R (arXiv 2505.21600), calibration, and the R-Stitch+ policy (arXiv 2507.17307)."""
