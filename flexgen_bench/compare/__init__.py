"""Two sets of records side by side: which cells became better, worse, or cannot be told apart."""
