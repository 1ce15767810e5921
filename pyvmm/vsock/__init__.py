"""The host's side of a vsock device: Unix sockets that lead into the guest and out of it.

    host.py         HostEnd, the sockets by the convention that Firecracker has made: PATH, where a client says
                    CONNECT PORT, and PATH_PORT, where a program listens for the guest; Caller, such a client
    options.py      what a user may say about all that
"""
