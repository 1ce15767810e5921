"""gdb's remote serial protocol: a debugger looks into a machine, stops it and lets it go on. server.py has the way in.
"""
