"""``race-dist bench quality``: what models with different mixing layers learn under one protocol.

``protocol`` reads a protocol, ``variants`` builds its models, ``language`` and ``recall`` are its tasks, ``worker`` trains one
model in a process of its own, ``run`` says what comes next and keeps the results, ``report`` makes a page of them.
"""
