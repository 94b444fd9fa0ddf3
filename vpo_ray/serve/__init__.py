"""The endpoint: an OpenAI-compatible service that answers a raw query with the optimised prompt."""
