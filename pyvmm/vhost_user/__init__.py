"""vhost-user: a program of the host's serves a device's queues. It maps the guest's memory, is rung by the guest's own
doorbells and interrupts it by eventfds; over a Unix socket it is told where the rings are.

``protocol.py`` has the numbers, ``link.py`` our end of the socket, ``server.py`` whoever is at the other one,
``virtiofsd.py`` the program that serves folders, ``options.py`` what may be asked for.
"""
