"""What a user launches: each file is one pipeline read top to bottom."""
