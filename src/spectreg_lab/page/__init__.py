"""The report: one self-contained page, its pictures and its tables as files."""
