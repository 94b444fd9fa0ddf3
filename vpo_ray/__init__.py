"""Prompt optimisers for text-to-video models: preference data, training and serving on Ray."""
