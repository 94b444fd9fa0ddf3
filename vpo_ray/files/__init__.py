"""Files that users hand in, and folders in which a file appears whole or not at all."""
