"""Input files of users, and folders in which files are written atomically."""
