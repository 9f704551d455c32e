"""A model over several processes, each with a device and a range of layers of its own.

Rank 0 lives in the caller's process and leads: it starts the others (or finds them, under ``torchrun``), tells them
which job to run, and all run it alike. What the ranks tell each other during a job goes over ``gloo_wire.py``; what
rank 0 asks of them, and the news of a rank's end, over a connection of its own (``control.py``).
"""
