"""What a run and a study are: frozen settings, read from TOML."""
