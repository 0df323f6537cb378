#!/usr/bin/env python3
"""Stands in for a service of Chronik in tests of the launcher: reads the same TOML, serves the
readiness endpoints, writes down when it stops. FAKE_FAIL=<name> makes that service fail at start,
FAKE_DEAF=<name> makes it ignore SIGTERM."""

import json
import os
import signal
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

config_path = sys.argv[sys.argv.index("--config") + 1]
name = os.path.basename(config_path).removesuffix(".toml")
with open(config_path, "rb") as file:
    config = tomllib.load(file)
config_folder = os.path.dirname(config_path)


def present(role):
    return sorted(f.removesuffix(".toml") for f in os.listdir(config_folder) if f.startswith(role))


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        answers = {
            "/readyz": {},
            "/v1/brokers": {
                "brokers": [
                    {"broker_id": int(b.split("-")[1]), "fenced": False} for b in present("broker")
                ]
            },
            "/v1/gateways": {"gateways": [{"gateway_id": g} for g in present("gateway")]},
        }
        answer = answers.get(self.path)
        self.send_response(200 if answer is not None else 404)
        body = json.dumps(answer).encode()
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


if os.environ.get("FAKE_FAIL") == name:
    print("the disk is on fire", flush=True)
    sys.exit(7)

address = config.get("http-listen") or config["rest-listen"]
host, port = address.split(":")
server = ThreadingHTTPServer((host, int(port)), Handler)


def stop(*_):
    if os.environ.get("FAKE_DEAF") == name:
        return
    journal = os.path.join(os.path.dirname(config_folder), "stopped.txt")
    with open(journal, "a") as file:
        file.write(name + "\n")
    os._exit(0)


signal.signal(signal.SIGTERM, stop)
print("serving", flush=True)
threading.Thread(target=server.serve_forever, daemon=True).start()
while True:
    signal.pause()
