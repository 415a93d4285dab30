"""Anomaly-OV served by vLLM: plugin, routes and launcher."""
