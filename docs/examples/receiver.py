"""Receives webhooks, and takes only those that are signed with SIGN_KEY. Python 3.9 or newer, nothing to install.

SIGN_KEY=... python receiver.py 8080
"""

import collections
import hashlib
import hmac
import json
import os
import sys
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = os.environ["SIGN_KEY"].encode()
TOLERANCE = 300  # seconds: an older one may have been recorded and be sent once more by somebody else

seen = collections.OrderedDict()  # ids; in a service of several processes: a table with a unique column


def verify(headers, body, now=None):
    """The event, or a ValueError. `body` is bytes, as they came: JSON that is written again has other ones."""
    webhook_id = headers.get("X-Webhook-Id", "")
    parts = dict(part.partition("=")[::2] for part in headers.get("X-Signature", "").split(","))
    timestamp = parts.get("t", "")
    signed = f"{timestamp}.{webhook_id}.".encode() + body
    expected = hmac.new(KEY, signed, hashlib.sha256).hexdigest()
    if not hmac.compare_digest(expected.encode(), parts.get("v1", "").encode()):
        raise ValueError("wrong signature")
    if abs((time.time() if now is None else now) - int(timestamp)) > TOLERANCE:
        raise ValueError("too old")
    return json.loads(body)


def take(webhook_id, event):
    """Handle one, but for one that has come before: the sender repeats it when an answer was lost."""
    if webhook_id in seen:
        return
    seen[webhook_id] = True
    if len(seen) > 100_000:
        seen.popitem(last=False)
    try:
        handle(event)
    except BaseException:
        seen.pop(webhook_id, None)  # the sender tries it again, and then it is to be handled
        raise


def handle(event):
    """What you do with it. Be quick, or put it in a queue: the next event of the job waits for your answer."""
    print(json.dumps(event), flush=True)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            event = verify(self.headers, body)
        except ValueError as fault:
            return self.answer(401, str(fault))
        try:
            take(self.headers["X-Webhook-Id"], event)
        except Exception:
            traceback.print_exc()
            return self.answer(500, "try again")
        return self.answer(200, "ok")

    def answer(self, status, text):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
