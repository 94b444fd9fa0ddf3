"""Video engines: a prompt becomes a video."""
