"""Speed of the recurrence, a layer and a training step, and exactness of every backend (``indrnn-bench``)."""
