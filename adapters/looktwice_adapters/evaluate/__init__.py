"""Evaluation: data set folders and a checkpoint -> the figures of the papers' tables."""
