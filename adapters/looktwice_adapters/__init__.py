"""The papers in plain torch: anomaly expert, memory bank, training and evaluation."""
