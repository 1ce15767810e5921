"""The host's side of a network card: where frames go to and come from.

    port.pyx      Port, one queue pair's end: TapPort (a frame a system call, virtio's header in front, straight from
                  and to guest memory) and StreamPort (a length and a frame, again and again, many a system call)
    backend.py    NetBackend, what a network device sees of its host: ports, offloads, whether anybody is there
    tap.py        a tap interface of Linux
    passt.py      passt, which needs no root: a program that plays the network on ordinary sockets
    unix.py       a Unix stream socket: another machine, or a program of the user's
    open.py       which of them is asked for
    options.py    what a user may say about all that
"""
