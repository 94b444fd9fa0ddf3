"""The client of OpenAI-compatible servers: budgets, retries, refusals and cost."""
