"""Run folders and study folders on disk."""
