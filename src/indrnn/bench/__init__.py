"""Speed of the recurrence, a layer and a training step, and exactness of every backend (``indrnn-bench``).

`commands` writes the results, `timing` times calls, `exact`, `recurrence` and `step` are the three commands.
"""
