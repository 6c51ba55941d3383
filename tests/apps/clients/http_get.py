"""http_get.py URL: prints status, length and digest of what came."""
import hashlib
import sys
import urllib.request

with urllib.request.urlopen(sys.argv[1], timeout=20) as reply:
    body = reply.read()
    print(reply.status, len(body), hashlib.sha256(body).hexdigest())
