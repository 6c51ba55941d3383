"""RabbitMQ, in Erlang, with clients in Python."""
import os
import signal

from harness import HERE, PYTHON, Skip, need
from . import Case

PROGRAM = ("RabbitMQ", "rabbitmq-server", "erlang-base", "python3-pika")
ERLANG = "/usr/lib/rabbitmq/bin/rabbitmq-server"


def run(r):
    if not os.path.exists(ERLANG):
        raise Skip("RabbitMQ is not installed")
    need("erl", "epmd")
    port, ports = r.port(), r.port()
    os.mkdir(r.path("rabbit"))
    # Its own map of names and its own directory: nothing of a RabbitMQ of the machine's is touched.
    r.server([need("epmd"), "-port", str(ports)], ports, role="observer")
    r.server([ERLANG], port, stop=signal.SIGTERM, env={
        "RABBITMQ_NODENAME": "sdptest@localhost", "RABBITMQ_NODE_PORT": str(port), "RABBITMQ_NODE_IP_ADDRESS": r.address,
        "RABBITMQ_DIST_PORT": str(r.port()), "RABBITMQ_MNESIA_BASE": r.path("rabbit"), "RABBITMQ_LOG_BASE": r.path("rabbit"),
        "RABBITMQ_CONF_ENV_FILE": "/dev/null", "RABBITMQ_CONFIG_FILE": r.path("none"), "RABBITMQ_ENABLED_PLUGINS_FILE": r.path("no_plugins"),
        "ERL_EPMD_PORT": str(ports), "ERL_EPMD_ADDRESS": "127.0.0.1", "RABBITMQ_PID_FILE": r.path("rabbit/pid")}, timeout=60)
    return r.client([PYTHON, os.path.join(HERE, "clients", "amqp.py"), r.address, str(port), str(r.amount(5000))]).stdout


CASES = [Case("rabbitmq", run, "5,000 messages, a publisher and 2 consumers (pika)", share=0.6, payload=40 << 20, extra=True)]
