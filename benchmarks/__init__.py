"""What pyvmm costs, against the floor and against other VMMs: ``pyvmm bench exits`` and ``pyvmm bench launch``.

Installed as ``pyvmm_benchmarks``, with what the pictures need by ``pip install 'pyvmm-kvm[bench]'``; in a checkout
``pyvmm bench`` takes it from here.

    sampling      turns, medians, intervals;  environment  the host;  report  table, JSON, comparison;  plots  pictures
    exits         the cost of an exit: cases, exit_guests, mailbox, contenders/
    launch        from the shell to the guest

The scripts beside them (exit_round_trip.py, two_vcpus.py, start.py, ide.py) stand alone: ``python benchmarks/NAME.py``.
"""
