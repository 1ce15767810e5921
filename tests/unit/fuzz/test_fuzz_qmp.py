"""A QMP client that makes no sense, for a while: bytes, and requests that are nearly right."""

from __future__ import annotations

import json

from fuzz.qmp import NAMES, one_input
from hypothesis import given, settings
from hypothesis import strategies as st

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
REQUESTS = st.fixed_dictionaries(
    {"execute": st.sampled_from(NAMES) | VALUES}, optional={"arguments": VALUES, "id": VALUES, "x": VALUES}
)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300))
def test_bytes(data: bytes) -> None:
    one_input(data)


@settings(max_examples=60, deadline=None)
@given(st.lists(REQUESTS, max_size=5), st.integers(0, 255), st.integers(0, 300), st.binary(max_size=4))
def test_requests_that_are_nearly_right(requests: list[object], step: int, at: int, noise: bytes) -> None:
    body = "".join(map(json.dumps, requests)).encode()
    one_input(bytes([step]) + body[:at] + noise + body[at:])
