"""Linear layers of the experts with their epilogues."""
