"""amqp.py ADDRESS PORT MESSAGES: a publisher and two consumers of a RabbitMQ queue; each message must come once."""
import hashlib
import sys
import threading

import pika

address, port, messages = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
where = pika.ConnectionParameters(address, port)
got, lock = [], threading.Lock()


def body(number):
    return b"%d " % number + hashlib.sha256(b"%d" % number).digest() * (1 + number * 7 % 400)


def consume():
    with pika.BlockingConnection(where) as link:
        channel = link.channel()
        channel.basic_qos(prefetch_count=50)
        for method, _, data in channel.consume("test", inactivity_timeout=0.5):
            if method is None:
                with lock:
                    if len(got) == messages:
                        break
                continue
            channel.basic_ack(method.delivery_tag)
            with lock:
                got.append(data)
        channel.cancel()


with pika.BlockingConnection(where) as link:
    channel = link.channel()
    channel.queue_declare("test")
    threads = [threading.Thread(target=consume) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(messages):
        channel.basic_publish("", "test", body(number))
    for thread in threads:
        thread.join()
assert sorted(got) == sorted(map(body, range(messages))), f"{len(got)} of {messages}, or not the same"
print("every message came once")
