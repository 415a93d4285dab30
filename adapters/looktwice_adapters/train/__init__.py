"""Training: free pictures and made-up defects -> the parts of a small checkpoint."""
