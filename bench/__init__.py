"""Performance tables: see __main__.py."""
