"""A VMM with known delays: ``fake_vmm.py WORK``, JSON, a list of steps done in order.

["sleep", s], ["say", text], ["end", status], ["hang"], ["tell", descriptor, text], ["hold", MiB] (writable memory,
all of it touched).
"""

import json
import mmap
import os
import sys
import time

held = []
for step, *arguments in json.loads(sys.argv[1]):
    if step == "sleep":
        # To the end of it, however the clock's ticks fall.
        end = time.monotonic() + arguments[0]
        while (left := end - time.monotonic()) > 0:
            time.sleep(left)
    elif step == "say":
        os.write(1, arguments[0].encode())
    elif step == "complain":
        os.write(2, arguments[0].encode())
    elif step == "tell":
        os.write(arguments[0], arguments[1].encode())
    elif step == "hold":
        memory = mmap.mmap(-1, arguments[0] << 20)
        memory.write(bytes(arguments[0] << 20))
        held.append(memory)
    elif step == "hang":
        time.sleep(600)
    elif step == "end":
        os._exit(arguments[0])
