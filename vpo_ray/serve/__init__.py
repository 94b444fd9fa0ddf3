"""The endpoint: an OpenAI-compatible service that answers a raw query with the optimised prompt."""

from vpo_ray.serve.run import ask, deploy, serve_forever, serving

__all__ = ["ask", "deploy", "serve_forever", "serving"]
