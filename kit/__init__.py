"""What the experiment needs and the paper does not speak of: files, tokens, checkpoints, the terminal, the report."""
