"""Linear algebra without a word of the field: Lanczos, directions."""
