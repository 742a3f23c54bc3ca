"""The fixed pixel orders of "permuted MNIST".

The literature has several different tasks of that name; each is reproduced here by the rule in its users' code. With a
permutation p, time step t shows pixel p[t], as ``x[:, p]`` does in all of them.

| name          | rule                                                        | used by                            |
| ------------- | ----------------------------------------------------------- | ---------------------------------- |
| seed92916     | numpy RandomState(92916).permutation(784)                   | scoRNN, expRNN, full-capacity uRNN |
| bitrev        | 0..1023 by their reversed ten bits, without those above 783 | HiPPO, LSSL, S4, S5                |
| torch12008    | torch.manual_seed(12008); randperm(784), on the CPU         | coRNN, LipschitzRNN                |
| torch5544     | torch.manual_seed(5544); randperm(784), on the CPU          | UnICORNN, LEM                      |
| numpy0        | numpy RandomState(0).permutation(784)                       | keras-lmu, RRU                     |
| random:<seed> | numpy RandomState(seed).permutation(784)                    |                                    |
"""

import hashlib
import re

import numpy as np
from numpy.typing import NDArray

from ..config.schema import MAX_SEED
from ..errors import UserError

PIXELS = 784
# The SHA-256 of each permutation: if a library's generator changed, the task would silently change too.
NAMED = {
    "seed92916": "96240fe27409981c3ed3e92c20d995f7103a94c2282307bc776923030113be74",
    "bitrev": "30d91dc29f161321971bfea6ba16c735e4b5fe678d607efb470896d9de75ef44",
    "torch12008": "f4113bc8ae78902146fba54feaff34c7de185249d3b85ce9584e3d76ca98b3bd",
    "torch5544": "88c77bc3e243c77bfa408d541c47529b0f18e4330833e084f860a8978f5465d7",
    "numpy0": "fe62e3fef305ce16e55f08cd0056a8b237e12af6c9523ff3fb35395f6ec55222",
}
CHOICES = f"choose from {', '.join(NAMED)}, random:<seed from 0 to {MAX_SEED}>"


def permutation_id(name: str) -> str:
    """The permutation as part of a folder name, for example random-7. Raises UserError for an unknown name."""
    seed = re.fullmatch("random:([0-9]+)", name)
    if seed and int(seed[1]) <= MAX_SEED:
        return f"random-{int(seed[1])}"
    if name not in NAMED:
        raise UserError(f"data.permutation={name} is unknown; {CHOICES}, or null for none")
    return name


def load_permutation(name: str) -> NDArray[np.int64]:
    """The permutation (784,) called ``name``.

    Raises:
        UserError: ``name`` is unknown, or the library that draws it draws a different one than published.
    """
    seed = int(re.sub(r"\D", "", permutation_id(name)) or 0)
    if name == "bitrev":
        permutation = np.array([int(f"{number:010b}"[::-1], 2) for number in range(1024)])
        permutation = permutation[permutation < PIXELS]
    elif name.startswith("torch"):
        import torch

        # A separate generator draws the same numbers as after torch.manual_seed and leaves the global one alone.
        generator = torch.Generator().manual_seed(seed)
        permutation = torch.randperm(PIXELS, generator=generator, device="cpu", dtype=torch.int64).numpy()
    else:
        # RandomState's stream is frozen (numpy NEP 19), unlike that of Generator.
        permutation = np.random.RandomState(seed).permutation(PIXELS)
    if name in NAMED and permutation_sha256(permutation) != NAMED[name]:
        raise UserError(f"data.permutation={name}: the installed NumPy or PyTorch draws another permutation")
    return permutation.astype(np.int64)


def permutation_sha256(permutation: NDArray[np.int64]) -> str:
    """SHA-256 of the permutation as little-endian 64-bit integers."""
    return hashlib.sha256(permutation.astype("<i8").tobytes()).hexdigest()
