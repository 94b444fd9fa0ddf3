"""The phases of the loop in order, rounds, evaluation, export and the ledger."""
