"""http_many.py ADDRESS PORT PATH CONNECTIONS REQUESTS: so many requests on each connection; prints what kinds of answers came.

A server may close a connection between two requests, which the second may meet: it is then made again, on a new connection.
"""
import collections
import hashlib
import http.client
import sys
import threading

address, port, path, connections, requests = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
answers = collections.Counter()


def ask(link):
    try:
        link.request("GET", path)
        reply = link.getresponse()
    except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
        link.close()  # before a byte of the answer: connects anew
        link.request("GET", path)
        reply = link.getresponse()
    body = reply.read()
    return reply.status, len(body), hashlib.sha256(body).hexdigest()[:16]


def talk():
    link = http.client.HTTPConnection(address, port, timeout=20)
    for _ in range(requests):
        try:
            answers[ask(link)] += 1
        except Exception as error:  # reported by the main thread
            answers[repr(error)] += 1
            link.close()
    link.close()


threads = [threading.Thread(target=talk) for _ in range(connections)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(sorted(answers.items(), key=str))
