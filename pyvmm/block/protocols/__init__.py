"""Protocols: where the bytes of an image come from, and filters in front of them; their tables are in block/open.py."""
