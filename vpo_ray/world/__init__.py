"""The small world that the demo runs in."""
