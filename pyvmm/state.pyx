"""State: what a device knows between two accesses, as plain data, so that another one can go on from there.

A holder of state (every Device, a drive, the clock, a vCPU) has three methods. While they are called the vCPUs are
parked, drives have nothing in flight and guest time stands.

``save()``        gives the state and changes nothing: a second one gives the same.
``load(state)``   takes it over into the holder's own fields. No line, no timer, no window, no file and no other holder
                  is touched, so that the order of loading means nothing. StateError names what can't be taken.
``after_load()``  comes when all have been loaded: lines are driven, timers armed, windows mapped, I/O goes on.

Plain data are None, bools, whole numbers of at most 64 bits, bytes, strings, lists, and dicts with strings for keys.

A holder's fields stand in one table, ``STATE``: the name of each attribute and what it may be. In the state they have
the same names, without the underscore in front. A table is data that costs nothing until somebody saves or loads:

    8                    a whole number of so many bits, from 0; of more than 64 it is bytes in the state, little endian
    range(1, 4)          a whole number in it
    "flag"               True or False
    "moment"             guest time in nanoseconds; in the state, how long from now (negative: ago)
    "timer"              a Timer; in the state, in how many nanoseconds it is due, None where it is not armed
    "part"               an object of its own with ``save`` and ``load``
    ("bytes", n)         so many bytes; ("bytes", n, m): from n to m of them
    ("list", kind, n)    so many of that kind, likewise
    ("each", {key: kind})  a dict of these keys
    ("one of", ...)      one of these values
    ("or none", kind)    that, or None

Compiled because a machine that goes on from a snapshot has a thousand values to be looked at, each of them hostile.

Times are relative to guest time, which is state itself (Clock.set_time): a holder whose table has some keeps its clock
as ``_clock``. ``STATE_VERSION`` goes up when the meaning of a table changes.
"""

from pyvmm.errors import StateError

LONGEST_NUMBER_BITS = 64
# So far from now a moment may be: 146 years. The sum of two such times is a whole number of 64 bits still.
TIMES_NS = range(-(1 << 62), 1 << 62)
OTHER = "this is the state of something else, or of another version"

cdef object NUMBERS = {bits: range(1 << bits) for bits in range(LONGEST_NUMBER_BITS + 1)}


# -- states that many machines go on from --------------------------------------------------------------------------------

cdef class Known(dict):
    """A state that does not change any more, and remembers what has been made of it: the next machine that goes on from
    it need not look at each value once more.
    """

    cdef object _key, _found

    def __reduce__(self):
        # A copy of it, or one that is sent, may change: it is an ordinary dict.
        return dict, (dict(self),)


def known(value):
    """A copy of a state, with every dict in it a Known."""
    if isinstance(value, dict):
        copy = Known()
        for name, inner in (<dict>value).items():
            copy[name] = known(inner)
        return copy
    if isinstance(value, list):
        return [known(inner) for inner in <list>value]
    return value


def once(state, key, make):
    """``make()``, which looks at ``state``; of a Known only the first time. ``key``: what else it depends on."""
    cdef Known here
    if type(state) is not Known:
        return make()
    here = state
    if here._found is None or here._key != key:
        here._found = make()
        here._key = key
    return here._found


# -- one holder's fields -----------------------------------------------------------------------------------------------

def save_fields(owner, fields):
    """The attributes of ``owner`` that the table names, as plain data."""
    now_ns = now(owner, fields)
    return {name.lstrip("_"): plain(kind, getattr(owner, name), now_ns) for name, kind in fields.items()}


def load_fields(owner, fields, state, besides=()):
    """Set the attributes of ``owner`` from what ``save_fields`` gave; none of them where that is a StateError.

    ``besides``: what else the state has, for the caller to take.
    """
    cdef Known here
    if type(state) is Known:
        here = state
        if here._key is not fields:
            here._found, here._key = checked_values(fields, state, besides), fields
        values = here._found
    else:
        values = checked_values(fields, state, besides)
    now_ns = now(owner, fields)
    for name, kind, value in <list>values:
        if now_ns:
            value = moved(kind, value, now_ns)
        put(owner, name, kind, own(value) if isinstance(value, list) else value)


cdef list own(list values):
    """A copy, since its owner may change it."""
    return [own(value) if isinstance(value, list) else value for value in values]


cdef list checked_values(fields, state, besides):
    """(attribute, kind, value) of each field; times as they are in the state, from now on."""
    names = [name.lstrip("_") for name in fields]
    check_names(state, [*names, *besides])
    return [(name, kind, value_of(kind, state[key], key)) for (name, kind), key in zip(fields.items(), names)]


cdef object moved(kind, value, now_ns):
    """A time from now on, or several, in guest time; what is none as it is."""
    if is_time(kind):
        return None if value is None else value + now_ns
    if isinstance(kind, tuple) and value is not None:
        if kind[0] == "or none":
            return moved(kind[1], value, now_ns)
        if kind[0] == "list" and has_times(kind):
            return [moved(kind[1], item, now_ns) for item in value]
        if kind[0] == "each" and has_times(kind):
            return {key: moved(kind[1][key], item, now_ns) for key, item in value.items()}
    return value


cdef object now(owner, fields):
    """Guest time, for a table that has times."""
    for kind in fields.values():
        if has_times(kind):
            return int(owner._clock.now_ns())
    return 0


cdef bint has_times(kind) noexcept:
    if isinstance(kind, tuple) and kind[0] != "one of":
        for inner in (<tuple>kind):
            if has_times(inner) or isinstance(inner, dict) and any_times(inner):
                return True
        return False
    return is_time(kind)


cdef bint any_times(dict kinds) noexcept:
    for kind in kinds.values():
        if has_times(kind):
            return True
    return False


cdef bint is_time(kind) noexcept:
    return isinstance(kind, str) and (kind == "moment" or kind == "timer")


cpdef check_names(state, names):
    """StateError where ``state`` is no dict with exactly these keys."""
    if not isinstance(state, dict):
        raise StateError(f"{shown(state)} is no state: give what save() gave")
    for name in names:
        if name not in <dict>state:
            raise StateError(f"{name} is missing: {OTHER}")
    if len(<dict>state) != len(names):
        strange = [name for name in state if name not in names]
        if strange:
            raise StateError(f"{shown(strange[0])} is unknown here: {OTHER}")


def shown(value):
    """A value in a message: hostile ones may be long, and Python refuses to write out a number that is too long."""
    if isinstance(value, int) and value.bit_length() > 2 * LONGEST_NUMBER_BITS:
        return f"a number of {value.bit_length()} bits"
    text = repr(value) if isinstance(value, (int, str, bytes, bool, type(None))) else f"a {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:37]}..."


# -- one value ---------------------------------------------------------------------------------------------------------

cpdef plain(kind, value, now_ns):
    """A field's value as plain data."""
    if isinstance(kind, int):
        return int(value) if kind <= LONGEST_NUMBER_BITS else value.to_bytes((kind + 7) // 8, "little")
    if isinstance(kind, str):
        if kind == "moment":
            return value - now_ns
        if kind == "timer":
            return value.deadline_ns - now_ns if value.armed else None
        if kind == "part":
            return value.save()
        return value
    if not isinstance(kind, tuple):
        return value
    if kind[0] == "bytes":
        return bytes(value)
    if kind[0] == "list":
        return [plain(kind[1], item, now_ns) for item in value]
    if kind[0] == "each":
        return {str(key): plain(inner, value[key], now_ns) for key, inner in kind[1].items()}
    if kind[0] == "or none":
        return None if value is None else plain(kind[1], value, now_ns)
    return value


cpdef value_of(kind, saved, name, now_ns=0):
    """What ``plain`` was given; a Timer's deadline in its place. StateError where it can't be."""
    if isinstance(kind, int):
        if kind > LONGEST_NUMBER_BITS:
            size = (kind + 7) // 8
            return int.from_bytes(value_of(("bytes", size), saved, name), "little")
        return checked_number(saved, NUMBERS[kind], name)
    if isinstance(kind, range):
        return checked_number(saved, kind, name)
    if isinstance(kind, str):
        if kind == "flag":
            if saved is not True and saved is not False:
                raise StateError(f"{name} is {shown(saved)}, not True or False")
            return saved
        if kind == "moment":
            return checked_number(saved, TIMES_NS, name) + now_ns
        if kind == "timer":
            return None if saved is None else checked_number(saved, TIMES_NS, name) + now_ns
        if kind == "part":
            if not isinstance(saved, dict):
                raise StateError(f"{name} is {shown(saved)}, no state")
            return saved
    assert isinstance(kind, tuple), kind
    return value_of_several(kind, saved, name, now_ns)


cdef value_of_several(tuple kind, saved, name, now_ns):
    what, inner = kind[0], kind[1]
    if what == "or none":
        return None if saved is None else value_of(inner, saved, name, now_ns)
    if what == "one of":
        for value in kind[1:]:
            if saved == value and type(saved) is type(value):
                return saved
        raise StateError(f"{name} is {shown(saved)}, none of {', '.join(map(repr, kind[1:]))}")
    if what == "bytes":
        if not isinstance(saved, (bytes, bytearray, memoryview)):
            raise StateError(f"{name} is {shown(saved)}, no bytes")
        check_length(len(saved), kind[1:], name, "bytes")
        return bytes(saved)
    if what == "list":
        if not isinstance(saved, (list, tuple)):
            raise StateError(f"{name} is {shown(saved)}, no list")
        check_length(len(saved), kind[2:], name, "entries")
        return [value_of(inner, item, f"{name}[{n}]", now_ns) for n, item in enumerate(saved)]
    assert what == "each", kind
    if not isinstance(saved, dict) or saved.keys() != {str(key) for key in inner}:
        raise StateError(f"{name} is {shown(saved)}, no dict of {', '.join(str(key) for key in inner)}")
    return {key: value_of(one, saved[str(key)], f"{name}[{key}]", now_ns) for key, one in inner.items()}


cpdef checked_number(saved, values, name):
    if type(saved) is not int:
        raise StateError(f"{name} is {shown(saved)}, no whole number")
    if saved not in values:
        raise StateError(f"{name} is {shown(saved)}, not from {values.start} to {values.stop - 1}")
    return saved


cpdef check_length(size, limits, name, of_what):
    lowest, highest = limits[0], limits[-1]
    if not lowest <= size <= highest:
        wanted = f"{lowest}" if lowest == highest else f"{lowest} to {highest}"
        raise StateError(f"{name} has {size} {of_what}, not {wanted}")


cpdef put(owner, name, kind, value):
    """Set one attribute. What others may hold a reference to is changed in place."""
    if kind == "timer":
        getattr(owner, name).note(value)
        return
    if kind == "part":
        part(name.lstrip("_"), getattr(owner, name), value)
        return
    if isinstance(value, (bytes, list, dict)) and not isinstance(getattr(type(owner), name, None), property):
        before = getattr(owner, name)
        if isinstance(value, dict):
            for key, inner in value.items():
                if isinstance(before[key], bytearray):
                    before[key][:] = inner
                else:
                    before[key] = inner
            return
        if isinstance(before, (bytearray, list)):
            before[:] = value
            return
        if hasattr(before, "extend"):  # a deque
            before.clear()
            before.extend(value)
            return
    setattr(owner, name, value)


def part(name, holder, state):
    """Load a part of a holder; a StateError of it gets its name in front."""
    try:
        holder.load(state)
    except StateError as error:
        raise StateError(f"{name}.{error}") from None


# -- all holders of a machine ------------------------------------------------------------------------------------------


def save_all(holders):
    """{name: {"version", "state"}} of each, in their order."""
    return {name: {"version": holder.STATE_VERSION, "state": holder.save()} for name, holder in holders}


def load_all(holders, saved, between=None):
    """Load each, then ``after_load`` of each, both in the order of the holders; ``between()`` in between.

    StateError in one sentence where the names are not the same, a version is another one, or a holder can't take its
    state. Some of them may have been loaded by then: what they belong to is to be reset, or thrown away.
    """
    check_holders(holders, saved)
    loaded = load_each(holders, saved)
    if between is not None:
        between()
    for name, holder in loaded:
        told(name, holder.after_load)


def load_each(holders, saved):
    """The first half of ``load_all``, of some or all of a machine's holders: those for which ``after_load`` is to follow.
    ``saved`` has all that they want, as ``check_holders`` says.
    """
    loaded = []
    for name, holder in holders:
        entry = saved[name]
        if not is_as_made(holder, entry):
            told(name, holder.load, entry["state"])
            loaded.append((name, holder))
    return loaded


def is_as_made(holder, entry):
    """Whether a holder that is made late (late.py) need not be made for this state: it would begin with it anyway. That
    takes making one to find out, so it is asked of states that many machines go on from, and once.
    """
    if type(entry) is not Known or getattr(holder, "made", True):
        return False
    return once(entry, "as made", lambda: holder.save() == entry["state"])


def check_holders(holders, saved):
    """StateError where ``saved`` is not of these holders, in these versions."""
    once(saved, tuple([name for name, _ in holders]), lambda: check_each(holders, saved))


def check_each(holders, saved):
    if not isinstance(saved, dict):
        raise StateError(f"{shown(saved)} is no state of a machine: give what save_state() gave")
    names = [name for name, _ in holders]
    for name in names:
        if name not in saved:
            raise StateError(f"the state has no {name}: it is of a machine with another configuration")
    for name in saved:
        if name not in names:
            raise StateError(f"the state has a {shown(name)}, this machine has none: give it the same configuration")
    for name, holder in holders:
        entry = saved[name]
        if not isinstance(entry, dict) or entry.keys() != {"version", "state"}:
            raise StateError(f"the state of {name} is {shown(entry)}, no version and state")
        if entry["version"] != holder.STATE_VERSION:
            raise StateError(
                f"the state of {name} is version {shown(entry['version'])}, this pyvmm has {holder.STATE_VERSION}: "
                "load it with the pyvmm that saved it"
            )
    return True


def told(name, call, *args):
    """``call(*args)``; what it raises, whatever a hostile state made of it, becomes a StateError that names the holder.
    """
    try:
        call(*args)
    except StateError as error:
        raise StateError(f"the state of {name}: {error}") from None
    except Exception as error:
        from pyvmm.errors import describe

        raise StateError(f"the state of {name} can't be taken: {describe(error)}") from error
