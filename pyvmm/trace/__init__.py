"""Tracing: what a machine does, as records in rings (recorder.pyx) that a thread writes to a file (format.py has its
layout), and what can be read out of that file.
"""
