"""Formats: where a byte of the guest's disk is in an image. Their table is pyvmm/block/open.py's FORMATS."""
