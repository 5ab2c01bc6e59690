"""A study carried out: its runs, its plan, its search, its display."""
