"""Ray Data: chains of stages as one execution, their actor pools, placement, resume and progress."""
