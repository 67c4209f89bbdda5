"""Several ranks and one sequence: who holds which rows, and what the ranks send each other."""
