"""Uses a memcached at the port of the first argument through pymemcache, a client of many Python programs."""

import sys

from pymemcache.client.base import Client
from pymemcache.exceptions import MemcacheClientError, MemcacheServerError

client = Client(("127.0.0.1", int(sys.argv[1])), timeout=30, no_delay=True)


def equal(found, expected):
    if found != expected:
        raise AssertionError(f"{found!r} instead of {expected!r}")


def raises(error, text, call, *arguments):
    try:
        call(*arguments, noreply=False)
    except error as raised:
        equal(text in str(raised), True)
    else:
        raise AssertionError(f"no {error.__name__}")


equal(client.version(), client.stats()[b"version"])
equal(client.get("a"), None)
equal(client.set("a", b"one", noreply=False), True)
equal(client.add("a", b"two", noreply=False), False)
equal(client.add("b", b"two", noreply=False), True)
equal(client.replace("c", b"three", noreply=False), False)
equal(client.replace("b", b"2", noreply=False), True)
equal(client.append("a", b">", noreply=False), True)
equal(client.prepend("a", b"<", noreply=False), True)
equal(client.append("c", b">", noreply=False), False)
equal(client.get_many(["a", "b", "c"]), {"a": b"<one>", "b": b"2"})

value, unique = client.gets("a")
equal(value, b"<one>")
equal(client.cas("a", b"1", unique, noreply=False), True)
equal(client.cas("a", b"2", unique, noreply=False), False)
equal(client.cas("c", b"2", unique, noreply=False), None)
equal(client.get("a"), b"1")
equal(client.gets_many(["a"])["a"][0], b"1")

equal(client.incr("a", 2**64 - 1), 0)
equal(client.incr("a", 10), 10)
equal(client.decr("a", 7), 3)
equal(client.decr("a", 7), 0)
equal(client.incr("c", 1), None)
client.set("d", b"text")
raises(MemcacheClientError, "non-numeric", client.incr, "d", 1)

equal(client.touch("d", 100, noreply=False), True)
equal(client.touch("c", 100, noreply=False), False)
equal(client.set("d", b"gone", expire=-1, noreply=False), True)
equal(client.get("d"), None)

# Values of all sizes and bytes, many at once, without answers but those to the last command.
values = {f"key-{n}": bytes(range(256)) * n + b"\r\nEND\r\n" for n in range(300)}
equal(client.set_many(values), [])
equal(client.get_many(list(values)), values)
large = bytes(range(256)) * 4096
equal(len(large), 1 << 20)
equal(client.set("large", large), True)
equal(client.get("large"), large)
raises(MemcacheServerError, "too large", client.set, "large", large + b"x")
equal(client.get("large"), None)

equal(client.delete("a", noreply=False), True)
equal(client.delete("a", noreply=False), False)
equal(client.flush_all(noreply=False), True)
equal(client.get_many(["b", *values]), {})
client.quit()
