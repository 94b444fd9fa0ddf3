"""The package's prompts (`*.txt`), and what makes a user's text safe in them."""
